"""ONNX graphs with their weights in files beside them: one layout, and one loop that writes.

Tensors are read when they are written, some rows at a time, so that a model larger than memory passes through. Nothing
here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from export.writer import BundleWriter, require_space
from plugins_trt.schema import DOMAIN, VERSION
from runtime.bundle.manifest import PRECISIONS, weights_of
from runtime.bundle.reader import size_text
from runtime.console.console import Advance, Console
from runtime.errors import BundleError

ALIGNMENT = 4096
"""Each tensor starts at a multiple of a memory page, so that runtimes can map it in place."""

NUMPY_DTYPES = PRECISIONS | {"bf16": np.dtype(ml_dtypes.bfloat16)}
"""The number formats of bundles, in which numpy computes bfloat16 too."""

BLOCK_BYTES = 32 << 20
"""How much of a tensor is in memory at a time, counted in float32."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is read when it is written.

    Attributes:
        dtype: its number format; bfloat16 is that of ``ml_dtypes``.
        shape: its sizes.
        blocks: reads it in consecutive blocks of rows, which joined are the tensor in row-major order.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class GraphFile:
    """A graph and its external data, as they will be written.

    Attributes:
        name: file name of the graph, as ``decoder.onnx``.
        model: the graph. Its initializers point to where ``layout`` places them in ``weights``.
        tensors: what lies there, in this order, by the names of initializers.
    """

    name: str
    model: onnx.ModelProto
    tensors: Mapping[str, TensorSource]

    @property
    def weights(self) -> str:
        """File name of its external data, as ``decoder.weights``."""
        return weights_of(self.name)


def layout(tensors: Mapping[str, TensorSource], file: str) -> dict[str, TensorProto]:
    """Returns initializers whose data lie one behind the other in a file of external data, in the order given."""
    offset, placed = 0, {}
    for name, source in tensors.items():
        tensor = TensorProto(name=name, dims=source.shape, data_type=helper.np_dtype_to_tensor_dtype(source.dtype))
        entries = {"location": file, "offset": offset, "length": source.nbytes}
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in entries.items())
        placed[name] = tensor
        offset = -(-(offset + source.nbytes) // ALIGNMENT) * ALIGNMENT
    return placed


def weights_size(graphs: Iterable[GraphFile]) -> int:
    """Returns the bytes of all weights of graphs, without the padding between tensors."""
    return sum(source.nbytes for graph in graphs for source in graph.tensors.values())


def operators(graphs: Iterable[GraphFile]) -> dict[str, int]:
    """Returns the custom operators that graphs use, with their version, as a manifest lists them."""
    used = {node.op_type for graph in graphs for node in graph.model.graph.node if node.domain == DOMAIN}
    return dict.fromkeys(sorted(used), VERSION)


def write_graphs(
    writer: BundleWriter,
    graphs: Sequence[GraphFile],
    console: Console,
    tables: Mapping[str, TensorSource] | None = None,
    other_bytes: int = 0,
) -> None:
    """Writes graphs with their weights into a bundle, and checks the graphs as ONNX does.

    Args:
        tables: tensors that are a file each, by its name.
        other_bytes: size of the other large files that the bundle will hold.

    Raises:
        BundleError: the disk is too small, or a graph does not pass.
    """
    files = {graph.weights: graph.tensors for graph in graphs} | {n: {n: table} for n, table in (tables or {}).items()}
    size = sum(source.nbytes for tensors in files.values() for source in tensors.values())
    # Graphs, padding, tokenizer and templates are a few megabytes.
    require_space(writer.target, size + other_bytes + (16 << 20))
    console.say(f"writing {size_text(size)} of weights")
    with console.bar("weights", size, "B") as advance:
        for name, tensors in files.items():
            _write_tensors(writer, name, tensors, advance)
    for graph in graphs:
        writer.write(graph.name, graph.model.SerializeToString(deterministic=True))
        try:
            # By path: that the external data is there is looked at without reading it.
            onnx.checker.check_model(str(writer.folder / graph.name))
            onnx.shape_inference.infer_shapes(graph.model, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"{graph.name} does not pass ONNX's checks, please report this: {reason}") from None
    names = ", ".join(graph.name for graph in graphs)
    console.say(f"checked: onnx.checker and strict shape inference pass on {names}")


def _write_tensors(writer: BundleWriter, name: str, tensors: Mapping[str, TensorSource], advance: Advance) -> None:
    with writer.open(name) as file:
        for tensor, source in tensors.items():
            file.pad_to(ALIGNMENT)
            start = file.size
            for block in source.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
                file.write(data.data)
                advance(data.nbytes)
            if file.size - start != source.nbytes:
                raise AssertionError(f"{tensor} should have {source.nbytes} bytes, got {file.size - start}")
