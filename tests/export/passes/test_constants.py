"""Constants in exported graphs: as tensors, so that tools that fold them keep their types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from runtime.backends.graph import INPUTS_EMBEDS, PAST, POSITION_IDS, VISUAL_MASK, WRITE_INDICES
from runtime.bundle.manifest import DECODER_GRAPH, VISUAL_DECODER_GRAPH

from ...conftest import Quantize

TOKENS, CAPACITY = 5, 8
TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def decoders(bundle: Path) -> list[Path]:
    return [bundle / name for name in (DECODER_GRAPH, VISUAL_DECODER_GRAPH) if (bundle / name).exists()]


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


def require_tensors(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    constants = [node for node in all_nodes(nodes) if node.op_type == "Constant"]
    assert constants
    for node in constants:
        assert [attribute.name for attribute in node.attribute] == ["value"], (graph, node.name)


def outputs(graph: Path) -> dict[str, np.ndarray]:
    """What a decoder makes of random tokens on empty caches."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    generator, feeds = np.random.default_rng(0), {}
    for item in session.get_inputs():
        if item.name == INPUTS_EMBEDS:
            feeds[item.name] = generator.standard_normal((1, TOKENS, item.shape[2])).astype(np.float32)
        elif item.name == VISUAL_MASK:
            feeds[item.name] = np.arange(TOKENS)[None] == 1
        elif item.name == POSITION_IDS:
            feeds[item.name] = np.arange(TOKENS)[None]
        elif item.name == WRITE_INDICES:
            feeds[item.name] = np.zeros(1, np.int64)
        elif item.name.startswith(PAST):
            feeds[item.name] = np.zeros((1, item.shape[1], CAPACITY, item.shape[3]), TYPES[item.type])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def fold(graph: Path, folder: Path) -> Path:
    """A graph as ``polygraphy surgeon sanitize --fold-constants`` leaves it."""
    for module in ("polygraphy", "onnx_graphsurgeon"):
        pytest.importorskip(module)
    target = folder / graph.name
    code = "from polygraphy.tools import main; main()"
    words = ["surgeon", "sanitize", str(graph), "--fold-constants", "-o", str(target)]
    result = subprocess.run(
        [sys.executable, "-c", code, *words, "--save-external-data", f"{graph.stem}.data"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def check(graph: Path, folder: Path) -> None:
    before, after = outputs(graph), outputs(fold(graph, folder))
    assert before.keys() == after.keys()
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_decoders(golden_bundle: Path, tmp_path: Path) -> None:
    for graph in decoders(golden_bundle):
        require_tensors(graph)
        check(graph, tmp_path)


@pytest.mark.parametrize(("mode", "form"), [("w8a16", "qdq"), ("w8a8", "qdq"), ("w8a16", "cpu")])
def test_quantized_decoders(tiny_v15_bundle: Path, quantize: Quantize, mode: str, form: str, tmp_path: Path) -> None:
    for graph in decoders(quantize(tiny_v15_bundle, mode, form)):
        require_tensors(graph)
        check(graph, tmp_path)


def test_vision(tiny_v1_bundle: Path, tiny_v1_portable_bundle: Path) -> None:
    for bundle in (tiny_v1_bundle, tiny_v1_portable_bundle):
        require_tensors(bundle / "vision.onnx")
