"""Tensors in files beside a graph: what ONNX reads back is what their sources gave."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.external_data import GraphFile, TensorSource, layout, weights_size, write_graphs
from export.writer import BundleWriter
from runtime.console.console import SILENT
from runtime.errors import BundleError

DTYPES = ("float32", "float16", ml_dtypes.bfloat16, "int8", "uint8")


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # Sizes that fill no page, one page, and more than one.
    shapes = ((3, 5), (1024, 4), (7,), (5000, 3), (2, 3, 4))
    made = {}
    for kind, shape in zip(DTYPES, shapes, strict=True):
        dtype = np.dtype(kind)
        made[dtype.name] = rng.integers(-100, 100, shape).astype(np.int8).astype(dtype)
    return made


def source(array: np.ndarray, rows: int = 2) -> TensorSource:
    """Gives the array some rows at a time, not all of them contiguous in memory."""
    blocks = [np.repeat(array[start : start + rows], 2, axis=0)[::2] for start in range(0, len(array), rows)]
    return TensorSource(array.dtype, array.shape, lambda: blocks)


def graph_file(tensors: dict[str, TensorSource], output: str = "float32") -> GraphFile:
    """A graph of one node that gives a tensor back."""
    node = helper.make_node("Identity", [output], ["y"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 5])
    graph = helper.make_graph([node], "g", [], [y], list(layout(tensors, "g.weights").values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return GraphFile("g.onnx", model, tensors)


def test_onnx_reads_back_what_sources_gave(tmp_path: Path) -> None:
    expected = arrays()
    file = graph_file({name: source(array) for name, array in expected.items()})
    table = np.arange(12, dtype="<f4").reshape(4, 3)
    with BundleWriter(tmp_path / "bundle") as writer:
        write_graphs(writer, [file], SILENT, {"table.bin": source(table)})
        tensors = onnx.load(writer.folder / "g.onnx").graph.initializer
        assert (writer.folder / "table.bin").read_bytes() == table.tobytes()
        size = (writer.folder / "g.weights").stat().st_size
    assert [item.name for item in tensors] == list(expected)
    for item in tensors:
        array = numpy_helper.to_array(item)
        assert array.dtype == expected[item.name].dtype
        np.testing.assert_array_equal(array, expected[item.name])
    assert weights_size([file]) == sum(array.nbytes for array in expected.values()) <= size


def test_each_tensor_starts_at_a_page_of_its_own() -> None:
    placed = layout({name: source(array) for name, array in arrays().items()}, "g.weights")
    end = 0
    for tensor in placed.values():
        entry = {item.key: item.value for item in tensor.external_data}
        offset = int(entry["offset"])
        assert offset % 4096 == 0
        assert end <= offset < end + 4096
        end = offset + int(entry["length"])


def test_a_source_that_gives_too_little_is_not_written_over(tmp_path: Path) -> None:
    short = TensorSource(np.dtype("<f4"), (3, 5), lambda: [np.zeros((2, 5), "<f4")])
    with (
        pytest.raises(AssertionError, match="float32 should have 60 bytes, got 40"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        write_graphs(writer, [graph_file({"float32": short})], SILENT)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_onnx_refuses_leaves_nothing(tmp_path: Path) -> None:
    tensors = {name: source(array) for name, array in arrays().items()}
    with (
        pytest.raises(BundleError, match=r"g\.onnx does not pass ONNX's checks, please report this"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        write_graphs(writer, [graph_file(tensors, output="float16")], SILENT)
    assert not list(tmp_path.iterdir())
