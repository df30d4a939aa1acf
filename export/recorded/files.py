"""The recorded set as other programs take it: polygraphy, which wants every input, and trtexec, which reads raw files.

Polygraphy knows bfloat16 only as a tensor of torch, and stores one as torch does. A bundle holds no such file; trtexec
fills caches, which no file names, with numbers of its own, which nothing of a first call sees.
"""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path

import numpy as np

from export.engines.target import TARGETS
from export.recorded import format as form
from export.recorded.compare import limit
from export.recorded.format import Array, Recording, Values, empty_caches
from runtime.backends.graph import INPUTS_EMBEDS
from runtime.backends.plugin_library import VARIABLE
from runtime.bundle.manifest import DECODER_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.console.files import new_folder
from runtime.errors import OptionError

_WITH_PLUGIN = (
    "import sys, {module}; {module}.get_plugin_registry().load_library(sys.argv.pop(1)); "
    "from polygraphy.tools import main; main()"
)
"""Polygraphy with our plugins registered: its ``--plugins`` opens a library, which registers none of this kind."""


def choose_length(bundle: Bundle, recording: Recording, named: int | None) -> int:
    """How many tokens the caches are to hold: by default those of the bundle's engines, or of the first recorded call.

    Raises:
        OptionError: fewer than the call has, or more than the bundle takes.
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


def write(bundle: Bundle, recording: Recording, max_length: int, folder: Path) -> None:
    """Writes the first call of each graph, the decoder's with empty caches.

    Raises:
        OptionError: the folder is there already.
        MonoedgeError: it cannot be written.
    """
    model, precision = bundle.manifest.model, bundle.manifest.precision
    with new_folder(folder) as partial:
        for graph, stem in form.GRAPHS.items():
            call = recording[graph][0]
            inputs = dict(call.inputs)
            for name, array in inputs.items():
                _stored(array, precision).tofile(partial / _raw(stem, name))
            if graph == DECODER_GRAPH:
                inputs |= empty_caches(model, max_length)
            (partial / f"{stem}.inputs.json").write_bytes(_inputs_json(inputs, precision))
            (partial / f"{stem}.outputs.json").write_bytes(form.outputs_json([call.outputs], "recorded"))


def commands(bundle: Bundle, recording: Recording, max_length: int, folder: Path) -> list[str]:
    """Lines for a shell that use the files: polygraphy on the graphs where a CPU runs them, both on the engines."""
    lines = []
    if bundle.manifest.precision != "bf16":
        for graph in form.GRAPHS:
            words = ["polygraphy", "run", str(bundle.path(graph)), "--onnxrt", *_compared(bundle, graph, folder)]
            lines.append(shlex.join(words))
    for name, record in bundle.manifest.engines.items():
        if record.graph in form.GRAPHS and record.max_length == max_length and record.max_batch == 1:
            lines.append(_polygraphy(bundle, name, record, folder))
            if record.target != "trt-rtx":
                lines.append(_trtexec(bundle, recording, name, record, folder))
    return lines


def _compared(bundle: Bundle, graph: str, folder: Path) -> list[str]:
    files = (folder / f"{form.GRAPHS[graph]}.{kind}.json" for kind in ("inputs", "outputs"))
    options = zip(("--load-inputs", "--load-outputs"), map(str, files), strict=True)
    threshold = f"{limit(bundle.manifest):.0f}"
    return [*(word for option in options for word in option), "--compare", "snr", "--snr-threshold", threshold]


def _polygraphy(bundle: Bundle, name: str, record: EngineRecord, folder: Path) -> str:
    words = ["run", str(bundle.path(name)), "--trt", "--model-type", "engine", *_compared(bundle, record.graph, folder)]
    rest = f"polygraphy {shlex.join(words)}"
    module = TARGETS[record.target].module
    if record.plugin_sha256:
        program = _WITH_PLUGIN.format(module=module)
        rest = f'python -c {shlex.quote(program)} "${VARIABLE}" {shlex.join(words)}'
    return ("POLYGRAPHY_USE_TENSORRT_RTX=1 " if record.target == "trt-rtx" else "") + rest


def _trtexec(bundle: Bundle, recording: Recording, name: str, record: EngineRecord, folder: Path) -> str:
    stem, inputs = form.GRAPHS[record.graph], recording[record.graph][0].inputs
    shapes = {given: array.shape for given, array in inputs.items()}
    if record.graph == DECODER_GRAPH:
        shapes |= {past: cache.shape for past, cache in empty_caches(bundle.manifest.model, record.max_length).items()}
    words = [
        "trtexec",
        f"--loadEngine={bundle.path(name)}",
        "--shapes=" + ",".join(f"{given}:{'x'.join(map(str, shape))}" for given, shape in shapes.items()),
        "--loadInputs=" + ",".join(f"{given}:{folder / _raw(stem, given)}" for given in inputs),
        f"--exportOutput={folder / f'{stem}.trtexec.json'}",
    ]
    plugin = [f'--staticPlugins="${VARIABLE}"'] if record.plugin_sha256 else []
    return " ".join([*map(shlex.quote, words), *plugin])


def _raw(stem: str, name: str) -> str:
    return f"{stem}.{name}.bin"


def _stored(array: Array, precision: str) -> Array:
    return form.narrow(array, precision) if array.dtype == np.float32 else array


def _inputs_json(inputs: Values, precision: str) -> bytes:
    if precision != "bf16":
        kind = {"fp32": np.float32, "fp16": np.float16}[precision]
        return form.inputs_json(
            [{name: array.astype(kind) if array.dtype == np.float32 else array for name, array in inputs.items()}]
        )
    import torch

    values = {}
    for name, array in inputs.items():
        tensor = torch.from_numpy(array)
        file = io.BytesIO()
        torch.save(tensor.bfloat16() if array.dtype == np.float32 else tensor, file)
        values[name] = {"tensor": base64.b64encode(file.getvalue()).decode(), form.CLASS: "Tensor"}
    return form.dump([values])
