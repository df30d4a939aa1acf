"""The recorded set of a bundle: inputs of its graphs, and what ONNX Runtime's outputs were, in polygraphy's JSON.

Polygraphy's arrays are files of numpy in base64 (its ``polygraphy/json/serde.py``); they are written and read here
without it, and without pickle. The decoder's calls are those of one sequence in order, on the caches that the calls
before left: a prompt with an image, then tokens one by one. Caches are not recorded, since a call sees nothing of them
but what the calls before wrote.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from runtime.backends.graph import (
    INPUTS_EMBEDS,
    LOGITS,
    PAST,
    PIXEL_VALUES,
    POSITION_IDS,
    VISUAL_EMBEDS,
    VISUAL_MASK,
    WRITE_INDICES,
    cache_names,
)
from runtime.bundle.engines import WEIGHTS
from runtime.bundle.manifest import DECODER_GRAPH, PRECISIONS, RECORDING, VISION_GRAPH, Manifest, ModelFacts
from runtime.bundle.reader import Bundle, sha256_of
from runtime.errors import BundleError

Array = npt.NDArray[Any]
Values = dict[str, Array]

MADE_OF = f"{RECORDING}/made_of.json"
"""Which files were recorded, by their SHA-256, and what ran them."""

GRAPHS = {VISION_GRAPH: "vision", DECODER_GRAPH: "decoder"}
"""The graphs, and what their recorded files begin with."""

_NUMPY = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
CLASS = "polygraphy_class"


def inputs_file(graph: str) -> str:
    """Polygraphy's ``--load-inputs``."""
    return f"{RECORDING}/{GRAPHS[graph]}.inputs.json"


def outputs_file(graph: str) -> str:
    """Polygraphy's ``--load-outputs``."""
    return f"{RECORDING}/{GRAPHS[graph]}.outputs.json"


FILES = (*(name(graph) for graph in GRAPHS for name in (inputs_file, outputs_file)), MADE_OF)


@dataclass(frozen=True)
class Call:
    """One call of a graph: its inputs but the caches, and its outputs but the caches.

    Numbers are in float32, those of inputs such as the bundle's number format has them.
    """

    inputs: Values
    outputs: Values


Recording = dict[str, list[Call]]
"""The calls of each graph, in order."""


def rounded(values: Array, precision: str) -> npt.NDArray[np.float32]:
    """float32 numbers as a number format has them."""
    return values.astype(_NUMPY[precision]).astype(np.float32)


def narrow(values: Array, precision: str) -> Array:
    """float32 numbers as backends take and give them, in ``PRECISIONS[precision]``."""
    return values.astype(_NUMPY[precision]).view(PRECISIONS[precision])


def wide(values: Array, precision: str) -> npt.NDArray[np.float32]:
    """The inverse of ``narrow``."""
    array: npt.NDArray[np.float32] = np.ascontiguousarray(values).view(_NUMPY[precision]).astype(np.float32)
    return array


def empty_caches(model: ModelFacts, capacity: int) -> Values:
    """The decoder's inputs for caches that hold nothing yet; one array for all of them."""
    cache = np.zeros((1, model.num_key_value_heads, capacity, model.head_dim), np.float32)
    return {PAST + name: cache for name in cache_names(model.num_hidden_layers)}


# Polygraphy's JSON ----------------------------------------------------------------------------------------------------


def inputs_json(calls: list[Values]) -> bytes:
    """A list of feed dictionaries."""
    return dump([{name: _encode(array) for name, array in values.items()} for values in calls])


def outputs_json(calls: list[Values], runner: str) -> bytes:
    """``RunResults`` of one runner; outputs in the order of the graph."""
    results = [
        {
            "outputs": {name: {"values": _encode(array), CLASS: "LazyArray"} for name, array in values.items()},
            "runtime": None,
            "runner_name": runner,
            CLASS: "IterationResult",
        }
        for values in calls
    ]
    return dump({"lst": [[runner, results]], CLASS: "RunResults"})


def dump(values: object) -> bytes:
    """JSON as it is stored."""
    return (json.dumps(values, indent=1) + "\n").encode()


def _encode(array: Array) -> dict[str, str]:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return {"array": base64.b64encode(file.getvalue()).decode(), CLASS: "ndarray"}


def _decode(value: Mapping[str, str]) -> Array:
    file = io.BytesIO(base64.b64decode(value["array"], validate=True))
    array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


# In a bundle ----------------------------------------------------------------------------------------------------------


def to_files(recording: Recording, made_of: dict[str, str], runner: str) -> dict[str, bytes]:
    """The files of a recorded set by their names in the bundle.

    Args:
        recording: what was recorded.
        made_of: the SHA-256 of each graph and its weights.
        runner: what ran them, with its version.
    """
    files = {}
    for graph, calls in recording.items():
        files[inputs_file(graph)] = inputs_json([call.inputs for call in calls])
        files[outputs_file(graph)] = outputs_json([call.outputs for call in calls], runner)
    files[MADE_OF] = dump({"runner": runner, "sha256": made_of})
    return files


def made_of(manifest: Manifest) -> dict[str, str]:
    """The files that a recorded set depends on, by their SHA-256."""
    return {name: manifest.files[name].sha256 for graph in GRAPHS for name in (graph, WEIGHTS[graph])}


def why_missing(bundle: Bundle) -> str | None:
    """Why a bundle has no recorded set that can be compared with; None if it has one."""
    if any(name not in bundle.manifest.files for name in FILES):
        return "the bundle has no recorded set"
    try:
        recorded = json.loads(bundle.path(MADE_OF).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(bundle, MADE_OF, error) from None
    if recorded != made_of(bundle.manifest):
        return "the bundle's recorded set is of other graphs or weights"
    return None


def read(bundle: Bundle) -> Recording:
    """The recorded set of a bundle, its hashes compared with the manifest's.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    if reason := why_missing(bundle):
        raise BundleError(f"{bundle.folder}: {reason}; this makes one: {command(bundle)}")
    return {graph: _read_graph(bundle, graph) for graph in GRAPHS}


def command(bundle: Bundle) -> str:
    """What records a bundle."""
    return f"python -m export.recording --bundle {bundle.folder}"


def _read_graph(bundle: Bundle, graph: str) -> list[Call]:
    for name in (inputs_file(graph), outputs_file(graph)):
        if sha256_of(bundle.path(name)) != bundle.manifest.files[name].sha256:
            raise _damaged(bundle, name, "its SHA-256 is not the manifest's")
    try:
        given = json.loads(bundle.path(inputs_file(graph)).read_text(encoding="utf-8"))
        ((_, results),) = json.loads(bundle.path(outputs_file(graph)).read_text(encoding="utf-8"))["lst"]
        calls = [
            Call(
                {name: _decode(value) for name, value in values.items()},
                {name: _decode(value["values"]) for name, value in result["outputs"].items()},
            )
            for values, result in zip(given, results, strict=True)
        ]
        _check(calls, graph, bundle.manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise _damaged(bundle, graph, error) from None
    return calls


def _check(calls: list[Call], graph: str, manifest: Manifest) -> None:
    """Names, shapes and types, and that the decoder's calls follow each other."""
    model, image, tokens = manifest.model, manifest.image, 0
    inputs: dict[str, tuple[tuple[int, ...], type[np.generic]]]
    outputs: dict[str, tuple[tuple[int, ...], type[np.generic]]]
    for call in calls:
        if graph == VISION_GRAPH:
            tiles = len(call.inputs[PIXEL_VALUES])
            inputs = {PIXEL_VALUES: ((tiles, 3, image.image_size, image.image_size), np.float32)}
            outputs = {VISUAL_EMBEDS: ((tiles, image.tokens_per_tile, model.hidden_size), np.float32)}
        else:
            length = call.inputs[INPUTS_EMBEDS].shape[1]
            inputs = {
                INPUTS_EMBEDS: ((1, length, model.hidden_size), np.float32),
                VISUAL_MASK: ((1, length), np.bool_),
                POSITION_IDS: ((1, length), np.int64),
                WRITE_INDICES: ((1,), np.int64),
            }
            outputs = {LOGITS: ((1, model.vocab_size), np.float32)}
            if not length or (call.inputs[POSITION_IDS] != tokens + np.arange(length)).any():
                raise ValueError(f"a call has not the positions from {tokens} on")
            tokens += length
        for values, expected in ((call.inputs, inputs), (call.outputs, outputs)):
            found = {name: (array.shape, array.dtype) for name, array in values.items()}
            if found != {name: (shape, np.dtype(kind)) for name, (shape, kind) in expected.items()}:
                raise ValueError(f"a call has {found}, expected {expected}")


def _damaged(bundle: Bundle, name: str, error: object) -> BundleError:
    return BundleError(
        f"{bundle.folder}: the recorded set of {name} is damaged ({' '.join(str(error).split())}): record it again "
        f"with: {command(bundle)} --overwrite"
    )
