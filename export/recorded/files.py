"""The recorded set for other programs: polygraphy, which takes every input in JSON, and trtexec, which reads raw files.

trtexec fills caches, which no file is given for, with numbers of its own; a first call sees none of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export.recorded.compare import LIMITS
from export.recorded.format import GRAPHS, Recording, empty_caches, narrow
from runtime.backends import Array
from runtime.backends.graph import INPUTS_EMBEDS
from runtime.backends.plugin_library import VARIABLE
from runtime.bundle.manifest import DECODER_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS
from runtime.console.files import new_folder
from runtime.errors import OptionError

_WITH_PLUGIN = (
    "import sys, {module}; {module}.get_plugin_registry().load_library(sys.argv.pop(1)); "
    "from polygraphy.tools import main; main()"
)
"""Polygraphy with our plugins registered: its ``--plugins`` opens a library, but registers no plugins such as ours."""


def choose_length(bundle: Bundle, recording: Recording, named: int | None) -> int:
    """Chooses how many tokens the caches hold: by default those of the bundle's engines, or of the first recorded call.

    Raises:
        OptionError: ``named`` is less than the call has, or more than the bundle takes.
    """
    call = recording[DECODER_GRAPH][0]
    tokens, most = call.inputs[INPUTS_EMBEDS].shape[1], bundle.manifest.model.max_length
    if named is None:
        lengths = {record.max_length for record in bundle.manifest.engines.values() if record.max_length >= tokens}
        return lengths.pop() if len(lengths) == 1 else tokens
    if not tokens <= named <= most:
        raise OptionError(
            f"--max-length {named} does not fit: the recorded call has {tokens} tokens, and the bundle takes {most}"
        )
    return named


def write(
    bundle: Bundle, recording: Recording, max_length: int, folder: Path, to_bfloat16: Callable[[Array], Any]
) -> None:
    """Writes the first call of each graph into a new folder. Needs polygraphy.

    The decoder's has empty caches for ``max_length`` tokens. In a bf16 bundle, ``to_bfloat16`` makes of an array what
    polygraphy takes, float32 as bfloat16.

    Raises:
        OptionError: the folder exists.
        MonoedgeError: it cannot be written.
    """
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    model, precision = bundle.manifest.model, bundle.manifest.precision

    def stored(array: Array) -> Array:
        return narrow(array, precision) if array.dtype == np.float32 else array

    with new_folder(folder) as partial:
        for graph in GRAPHS:
            call = recording[graph][0]
            for name, array in call.inputs.items():
                stored(array).tofile(partial / _raw(graph, name))
            inputs = call.inputs | (empty_caches(model, max_length) if graph == DECODER_GRAPH else {})
            convert = to_bfloat16 if precision == "bf16" else stored
            feed = {name: convert(array) for name, array in inputs.items()}
            save_json([feed], str(partial / _json(graph, "inputs")))
            result = IterationResult(call.outputs, runner_name="recorded")
            save_json(RunResults([("recorded", [result])]), str(partial / _json(graph, "outputs")))


def commands(bundle: Bundle, recording: Recording, max_length: int, folder: Path) -> list[str]:
    """Returns shell commands that use the files: polygraphy on graphs that a CPU runs, both programs on engines."""
    lines = []
    if bundle.manifest.precision != "bf16":
        for graph in GRAPHS:
            words = ["polygraphy", "run", str(bundle.path(graph)), "--onnxrt", *_compared(bundle, graph, folder)]
            lines.append(shlex.join(words))
    for name, record in bundle.manifest.engines.items():
        if record.graph in GRAPHS and record.max_length == max_length and record.max_batch == 1:
            lines.append(_polygraphy(bundle, name, record, folder))
            if not TARGETS[record.target].capabilities:  # trtexec is TensorRT's, not that for RTX
                lines.append(_trtexec(bundle, recording, name, record, folder))
    return lines


def _compared(bundle: Bundle, graph: str, folder: Path) -> list[str]:
    inputs, outputs = (str(folder / _json(graph, kind)) for kind in ("inputs", "outputs"))
    loaded = ["--load-inputs", inputs, "--load-outputs", outputs]
    return [*loaded, "--compare", "snr", "--snr-threshold", f"{LIMITS[bundle.manifest.precision]:.0f}"]


def _polygraphy(bundle: Bundle, name: str, record: EngineRecord, folder: Path) -> str:
    words = ["run", str(bundle.path(name)), "--trt", "--model-type", "engine", *_compared(bundle, record.graph, folder)]
    target, program = TARGETS[record.target], "polygraphy"
    if record.plugin_sha256:
        program = f'python -c {shlex.quote(_WITH_PLUGIN.format(module=target.module))} "${VARIABLE}"'
    return f"{'POLYGRAPHY_USE_TENSORRT_RTX=1 ' if target.capabilities else ''}{program} {shlex.join(words)}"


def _trtexec(bundle: Bundle, recording: Recording, name: str, record: EngineRecord, folder: Path) -> str:
    inputs = recording[record.graph][0].inputs
    shapes = {given: array.shape for given, array in inputs.items()}
    if record.graph == DECODER_GRAPH:
        shapes |= {past: cache.shape for past, cache in empty_caches(bundle.manifest.model, record.max_length).items()}
    words = [
        "trtexec",
        f"--loadEngine={bundle.path(name)}",
        "--shapes=" + ",".join(f"{given}:{'x'.join(map(str, shape))}" for given, shape in shapes.items()),
        "--loadInputs=" + ",".join(f"{given}:{folder / _raw(record.graph, given)}" for given in inputs),
        f"--exportOutput={folder / _json(record.graph, 'trtexec')}",
    ]
    plugin = [f'--staticPlugins="${VARIABLE}"'] if record.plugin_sha256 else []
    return " ".join([*map(shlex.quote, words), *plugin])


def _json(graph: str, kind: str) -> str:
    return f"{Path(graph).stem}.{kind}.json"


def _raw(graph: str, name: str) -> str:
    return f"{Path(graph).stem}.{name}.bin"
