"""How far INT8 moves the answers of the example checkpoint: ours, and what else quantizes ONNX, in one table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from calibration.data import Example, digest, read_examples
from calibration.observed.observe import observe
from calibration.observed.record import Origin, Record, bundle_hash
from calibration.reporting.report import ROWS
from calibration.scales.choose import Choice, choose
from calibration.trial.budget import Trials
from calibration.trial.measure import KINDS, Comparison, Reference
from calibration.trial.prober import Prober
from export.quantized.quantizable import Matrix, choose_matrices, find_matrices
from export.quantized.weights import DecoderWeights
from runtime.backends import Array
from runtime.backends.graph import GraphInMemory
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.console.console import Console
from runtime.console.run import run
from runtime.console.table import markdown
from runtime.errors import MonoedgeError
from runtime.model import Model

_DESCRIPTION = """\
Exports the example checkpoint, draws pictures and questions, calibrates in several ways, and prints how far the
answers to other questions, of another seed, moved: the table of docs/calibration.md. onnxruntime's own static
quantization, and that of nvidia-modelopt where it is installed, quantize the same matrices with the same data.

examples:
  python benchmarks/int8.py                                   # half an hour on two cores
  python benchmarks/int8.py --pictures 32 --questions 50      # a first look
  python benchmarks/int8.py --modelopt other-venv/bin/python  # an interpreter with nvidia-modelopt[onnx]

Run it in a checkout that is installed with: pip install -e '.[cpu,export,calibration]'"""

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 48

EVERYTHING = (("text", "visual"), True, True)
TEXT = (("text",), False, False)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    mode: str
    form: str
    parts: tuple[tuple[str, ...], bool, bool] = TEXT
    choice: Choice = field(default_factory=Choice)


PLAIN = Choice(weights="absmax", activations="absmax", smoothing="off")
OURS = (
    Row("ours", "w8a16", "qdq"),
    Row("absmax, round to nearest", "w8a16", "qdq", choice=PLAIN),
    Row("ours, as ONNX Runtime's MatMulNBits", "w8a16", "cpu"),
    Row("ours, everything quantized", "w8a16", "qdq", EVERYTHING),
    Row("absmax, everything quantized", "w8a16", "qdq", EVERYTHING, PLAIN),
    Row("ours, everything, as MatMulNBits", "w8a16", "cpu", EVERYTHING),
    Row("ours", "w8a8", "qdq"),
    Row("ours, activations by percentile", "w8a8", "qdq", choice=Choice(activations="percentile")),
    Row("ours, activations by entropy", "w8a8", "qdq", choice=Choice(activations="entropy")),
    Row("absmax, no smoothing", "w8a8", "qdq", choice=PLAIN),
)
OTHERS = {
    "onnxruntime": ("minmax",),
    "modelopt": ("max", "entropy"),
}
"""Methods of other tools by the names that they give them. onnxruntime's entropy wants inputs of one size, which
prompts are not."""


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "examples/shapes/checkpoint", metavar="CKPT", help="what to export")
    add("--pictures", type=int, default=256, metavar="N", help="pictures to calibrate with, a question each (256)")
    add("--questions", type=int, default=1000, metavar="N", help="questions to measure with (1000)")
    add("--modelopt", metavar="PYTHON", help="an interpreter that has nvidia-modelopt, beside what this script needs")
    add("--json", type=Path, metavar="FILE", help="write the raw numbers too")
    add("--child", nargs=5, metavar=("TOOL", "METHOD", "BUNDLE", "DATA", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _quantize_elsewhere(*arguments.child)
        return
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        _benchmark(arguments, Path(folder))


def _benchmark(arguments: argparse.Namespace, scratch: Path) -> None:
    bundle, console = scratch / "bundle", Console()
    _call("-m", "export.onnx", "--ckpt", str(arguments.ckpt), "-o", str(bundle))
    data, tests = _draw(scratch, arguments.pictures, arguments.questions)
    opened = Bundle(bundle)
    weights = DecoderWeights(opened)
    matrices = find_matrices(weights.model)
    record = _observed(
        weights, choose_matrices(matrices, *EVERYTHING), read_examples(data), scratch / "record.npz", console
    )
    prober = Prober(Model(opened, OnnxRuntimeBackend(opened)), None, NEW_TOKENS)
    with console.bar("answers before", arguments.questions) as advance:
        reference = Reference(prober, read_examples(tests), advance, scratch)

    results = []
    for row in OURS:
        choice = replace(row.choice, mode=row.mode)
        chosen = choose(weights, choose_matrices(matrices, *row.parts), record, choice, lambda count: None)
        trial = Trials(weights, reference, row.form, None, console).run(chosen.plan, f"{row.mode}, {row.name}")
        results.append(_result(row.mode, row.name, trial.comparison))
    for tool, python in (("onnxruntime", sys.executable), ("modelopt", arguments.modelopt)):
        for method in OTHERS[tool] if python else ():
            name = f"{tool}, {method}"
            model = scratch / f"{tool}-{method}.onnx"
            try:
                _call(__file__, "--child", tool, method, str(bundle), str(data), str(model), python=python)
            except MonoedgeError as error:
                print(f"{name}: {error}", file=sys.stderr)
                results.append({"mode": "w8a8", "name": name, "figures": None})
                continue
            graphs = {DECODER_GRAPH: GraphInMemory(model.read_bytes())}
            other = Model(opened, OnnxRuntimeBackend(opened, graphs=graphs))
            with console.bar(name, arguments.questions) as advance:
                comparison = reference.compare(Prober(other, None, NEW_TOKENS), advance)
            results.append(_result("w8a8", name, comparison))
    print(_table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _draw(scratch: Path, pictures: int, questions: int) -> tuple[Path, Path]:
    """One question about each scene to calibrate with, a fifth told in words; and questions of another seed."""
    script = str(ROOT / "examples/shapes/data.py")
    _call(script, str(scratch / "drawn"), "--count", str(6 * pictures), "--seed", "101", "--text-only", "0.2")
    _call(script, str(scratch / "tests"), "--count", str(questions), "--seed", "202", "--text-only", "0.2")
    lines = [json.loads(line) for line in (scratch / "drawn/data.jsonl").read_text().splitlines()]
    scenes: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        # A scene in words is the first lines of the prompt; the question is the last.
        scenes.setdefault(line["image"] or line["prompt"].rpartition("\n")[0], []).append(line)
    chosen = [group[index % len(group)] for index, group in enumerate(scenes.values())][:pictures]
    if len(chosen) < pictures:
        raise MonoedgeError(f"{len(chosen)} scenes were drawn, {pictures} are needed")
    for line in chosen:
        # The model answers itself.
        line.pop("answer", None)
    data = scratch / "drawn/calibration.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return data, scratch / "tests/data.jsonl"


def _observed(
    weights: DecoderWeights, matrices: Sequence[Matrix], examples: Sequence[Example], file: Path, console: Console
) -> Record:
    names, manifest = tuple(matrix.name for matrix in matrices), weights.bundle.manifest
    hashes = bundle_hash(manifest), manifest.name, digest(examples)
    record = Record.nothing(
        Origin(*hashes, len(examples), 0, None, NEW_TOKENS, names), [matrix.channels for matrix in matrices]
    )
    with console.bar("observing", len(examples)) as advance:
        observe(weights, examples, record, file, advance)
    return record


# ---- other tools ---------------------------------------------------------------------------------------------------


class _Feeds:
    """A calibration data reader of onnxruntime and modelopt: the decoder's inputs, chunk by chunk.

    The caches have the chunk's own rows already. The decoder writes the same ones again.
    """

    def __init__(self, bundle: Bundle, examples: Sequence[Example]) -> None:
        self._bundle, self._examples = bundle, examples
        self.rewind()

    def rewind(self) -> None:
        """From the beginning."""
        self._feeds = self._all()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next, None at the end."""
        return next(self._feeds, None)

    def get_first(self) -> dict[str, np.ndarray]:
        """One to look at."""
        return next(self._all())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._all()

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._feeds)

    def _all(self) -> Iterator[dict[str, np.ndarray]]:
        waiting: list[dict[str, np.ndarray]] = []

        def take(inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
            waiting.append({name: value.copy() for name, value in inputs.items()})

        backend = OnnxRuntimeBackend(self._bundle, observer=take)
        prober = Prober(Model(self._bundle, backend), None, NEW_TOKENS)
        for example in self._examples:
            for _ in prober.answer(prober.prompt(example)):
                yield from waiting
                waiting.clear()


def _quantize_elsewhere(tool: str, method: str, bundle: str, data: str, target: str) -> None:
    """In a child: the text experts' matrices quantized by another tool."""
    opened = Bundle(bundle)
    matrices = {matrix.name for matrix in choose_matrices(find_matrices(DecoderWeights(opened).model))}
    inlined = onnx.inliner.inline_local_functions(onnx.load(opened.path(DECODER_GRAPH)))
    nodes = [node.name or f"node_{index}" for index, node in enumerate(inlined.graph.node)]
    for node, name in zip(inlined.graph.node, nodes, strict=True):
        node.name = name
    chosen = [node.name for node in inlined.graph.node if node.op_type == "Gemm" and node.input[1] in matrices]
    if len(chosen) != len(matrices):
        raise MonoedgeError(f"{len(matrices)} matrices are in {len(chosen)} Gemm nodes")
    source = Path(target).with_suffix(".inlined.onnx")
    onnx.save(inlined, source)
    feeds = _Feeds(opened, read_examples(Path(data)))
    _TOOLS[tool](source, Path(target), feeds, chosen, method)


def _onnxruntime(source: Path, target: Path, feeds: _Feeds, nodes: list[str], method: str) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    methods = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}
    quantize_static(
        source,
        target,
        feeds,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Gemm"],
        nodes_to_quantize=nodes,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=methods[method],
    )


def _modelopt(source: Path, target: Path, feeds: _Feeds, nodes: list[str], method: str) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        str(source),
        quantize_mode="int8",
        calibration_data_reader=feeds,
        calibration_method=method,
        calibration_eps=["cpu"],
        op_types_to_quantize=["Gemm"],
        nodes_to_quantize=nodes,
        output_path=str(target),
        high_precision_dtype="fp32",
        log_level="WARNING",
    )


_TOOLS: dict[str, Callable[[Path, Path, _Feeds, list[str], str], None]] = {
    "onnxruntime": _onnxruntime,
    "modelopt": _modelopt,
}


# ---- output --------------------------------------------------------------------------------------------------------


def _result(mode: str, name: str, comparison: Comparison) -> dict[str, Any]:
    figures = {kind: comparison.figures(None if kind == "all" else kind) for kind in ("all", *KINDS)}
    return {"mode": mode, "name": name, "figures": {kind: found and asdict(found) for kind, found in figures.items()}}


def _table(results: Sequence[dict[str, Any]]) -> str:
    columns = [row for row in ROWS if row[1] not in ("questions", "tokens")]
    rows = [["", *(title for title, _, _ in columns), "KL, pictures", "KL, text only"]]
    for result in results:
        figures, cells = result["figures"], ["failed", *[""] * (len(columns) + 1)]
        if figures is not None:
            cells = [form.format(figures["all"][name]) for _, name, form in columns]
            cells += [f"{figures[kind]['mean_kl']:.2e}" if figures[kind] else "–" for kind in KINDS]
        rows.append([f"{result['mode']}: {result['name']}", *cells])
    return markdown(rows)


def _call(*arguments: str, python: str = sys.executable) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(  # noqa: S603 - our own scripts
        [python, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        said = (result.stderr.strip() or "nothing was said").splitlines()[-1]
        raise MonoedgeError(f"{Path(arguments[0]).name} {' '.join(arguments[1:4])} failed: {said}")


if __name__ == "__main__":
    run(main)
