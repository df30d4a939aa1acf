"""The recorded set of a bundle: inputs of its graphs, and what ONNX Runtime's outputs were.

The decoder's calls are those of one sequence in order: a prompt with an image, then tokens one by one. Each call works
on the caches that the calls before left. Caches are not recorded, since a call sees nothing of them but what the calls
before wrote.
"""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.external_data import NUMPY_DTYPES
from runtime.backends import Array
from runtime.backends import graph as names
from runtime.bundle.engines import WEIGHTS
from runtime.bundle.manifest import DECODER_GRAPH, PRECISIONS, RECORDING, VISION_GRAPH, Manifest, ModelFacts
from runtime.bundle.reader import Bundle, sha256_of
from runtime.errors import BundleError
from runtime.records import read_json

Values = dict[str, Array]

CALLS = f"{RECORDING}/calls.npz"
"""The arrays of all calls, by names as ``decoder.onnx/0/inputs/inputs_embeds``."""

MADE_OF = f"{RECORDING}/made_of.json"
"""Which files were recorded, by their SHA-256, and what ran them."""

FILES = (CALLS, MADE_OF)
GRAPHS = (VISION_GRAPH, DECODER_GRAPH)


@dataclass(frozen=True)
class Call:
    """One call of a graph: its inputs and outputs without the caches.

    Numbers are float32; those of inputs are rounded to the bundle's number format.
    """

    inputs: Values
    outputs: Values


Recording = dict[str, list[Call]]
"""The calls of each graph, in order."""


def rounded(values: Array, precision: str) -> npt.NDArray[np.float32]:
    """Rounds float32 numbers to a number format; the result is float32 again."""
    return values.astype(NUMPY_DTYPES[precision]).astype(np.float32)


def narrow(values: Array, precision: str) -> Array:
    """Converts float32 numbers to what backends take and give, ``PRECISIONS[precision]``."""
    return values.astype(NUMPY_DTYPES[precision]).view(PRECISIONS[precision])


def wide(values: Array, precision: str) -> npt.NDArray[np.float32]:
    """Converts what ``narrow`` gave back to float32."""
    array: npt.NDArray[np.float32] = np.ascontiguousarray(values).view(NUMPY_DTYPES[precision]).astype(np.float32)
    return array


def empty_caches(model: ModelFacts, capacity: int) -> Values:
    """Returns the decoder's inputs for caches that hold nothing yet; one array for all of them."""
    cache = np.zeros((1, model.num_key_value_heads, capacity, model.head_dim), np.float32)
    return {names.PAST + name: cache for name in names.cache_names(model.num_hidden_layers)}


def to_files(recording: Recording, made_of: dict[str, str], runner: str) -> dict[str, bytes]:
    """Returns the files of a recorded set by their names in the bundle; equal sets give equal bytes.

    ``made_of`` has the SHA-256 of each graph and its weights; ``runner`` says what ran them, with its version.
    """
    arrays = {
        f"{graph}/{index}/{kind}/{name}": array
        for graph, calls in recording.items()
        for index, call in enumerate(calls)
        for kind, values in vars(call).items()
        for name, array in values.items()
    }
    file = io.BytesIO()
    # numpy dates all members 1980.
    np.savez(file, **arrays)
    facts = json.dumps({"runner": runner, "sha256": made_of}, indent=1) + "\n"
    return {CALLS: file.getvalue(), MADE_OF: facts.encode()}


def made_of(manifest: Manifest) -> dict[str, str]:
    """Returns the SHA-256 of the files that a recorded set depends on."""
    return {name: manifest.files[name].sha256 for graph in GRAPHS for name in (graph, WEIGHTS[graph])}


def why_missing(bundle: Bundle) -> str | None:
    """Returns why a bundle has no recorded set that can be compared with; None if it has one."""
    if MADE_OF not in bundle.manifest.files:
        return "the bundle has no recorded set"
    if CALLS not in bundle.manifest.files:
        return "the bundle's recorded set is in the form of an older monoedge"
    try:
        recorded = read_json(bundle.path(MADE_OF))["sha256"]
    except (BundleError, KeyError, TypeError) as error:
        raise _damaged(bundle, MADE_OF, error) from None
    if recorded != made_of(bundle.manifest):
        return "the bundle's recorded set is of other graphs or weights"
    return None


def command(bundle: Bundle) -> str:
    """Returns the command that records a bundle."""
    return f"python -m export.recording --bundle {shlex.quote(str(bundle.folder))}"


def read(bundle: Bundle) -> Recording:
    """Reads the recorded set of a bundle, and compares its hash with the manifest's.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    if reason := why_missing(bundle):
        again = " again" if MADE_OF in bundle.manifest.files else ""
        raise BundleError(f"{bundle.folder}: {reason}: record it{again} with: {command(bundle)}")
    if sha256_of(bundle.path(CALLS)) != bundle.manifest.files[CALLS].sha256:
        raise _damaged(bundle, CALLS, "its SHA-256 is not the manifest's")
    recording: Recording = {graph: [] for graph in GRAPHS}
    try:
        with np.load(bundle.path(CALLS), allow_pickle=False) as arrays:
            for key, array in arrays.items():
                graph, index, kind, name = key.split("/")
                if int(index) == len(recording[graph]):
                    recording[graph].append(Call({}, {}))
                vars(recording[graph][int(index)])[kind][name] = array
        for graph, calls in recording.items():
            _check(calls, graph, bundle.manifest)
    except Exception as error:  # numpy and zipfile raise a dozen types for damaged files
        raise _damaged(bundle, CALLS, error) from None
    return recording


def _check(calls: list[Call], graph: str, manifest: Manifest) -> None:
    """Checks names, shapes and types, and that the decoder's calls follow each other."""
    model, image, tokens = manifest.model, manifest.image, 0
    if not calls:
        raise ValueError(f"{graph} has no calls")
    inputs: dict[str, tuple[tuple[int, ...], type[np.generic]]]
    outputs: dict[str, tuple[tuple[int, ...], type[np.generic]]]
    for call in calls:
        if graph == VISION_GRAPH:
            tiles = len(call.inputs[names.PIXEL_VALUES])
            inputs = {names.PIXEL_VALUES: ((tiles, 3, image.image_size, image.image_size), np.float32)}
            outputs = {names.VISUAL_EMBEDS: ((tiles, image.tokens_per_tile, model.hidden_size), np.float32)}
        else:
            length = call.inputs[names.INPUTS_EMBEDS].shape[1]
            inputs = {
                names.INPUTS_EMBEDS: ((1, length, model.hidden_size), np.float32),
                names.VISUAL_MASK: ((1, length), np.bool_),
                names.POSITION_IDS: ((1, length), np.int64),
                names.WRITE_INDICES: ((1,), np.int64),
            }
            outputs = {names.LOGITS: ((1, model.vocab_size), np.float32)}
            if not length or (call.inputs[names.POSITION_IDS] != tokens + np.arange(length)).any():
                raise ValueError(f"a call does not have the positions from {tokens} on")
            tokens += length
        for values, expected in ((call.inputs, inputs), (call.outputs, outputs)):
            found = {name: (array.shape, array.dtype) for name, array in values.items()}
            if found != {name: (shape, np.dtype(kind)) for name, (shape, kind) in expected.items()}:
                raise ValueError(f"a call has {found}, expected {expected}")


def _damaged(bundle: Bundle, name: str, error: object) -> BundleError:
    return BundleError(
        f"{bundle.folder}: {name} of the recorded set is damaged ({' '.join(str(error).split())}): record it again "
        f"with: {command(bundle)} --overwrite"
    )
