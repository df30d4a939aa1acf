"""What the initializers of a quantized decoder hold, some rows at a time, and where they lie in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.errors import QuantizationError
from export.quantized import quantize
from export.quantized.nodes import ZERO, input_scale_name, scale_name
from export.quantized.plan import MatrixPlan, Vector
from export.quantized.weights import Weights
from export.writer import ALIGNMENT
from runtime.bundle.manifest import CPU, DECODER_WEIGHTS


@dataclass(frozen=True)
class Content:
    """What an initializer holds: consecutive blocks, which joined are the tensor in row-major order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def place(contents: Mapping[str, Content], file: str) -> list[TensorProto]:
    """Initializers that lie one behind the other in a file of external data, each from a page of memory on."""
    offset, tensors = 0, []
    for name, content in contents.items():
        tensor = TensorProto(name=name, dims=content.shape, data_type=helper.np_dtype_to_tensor_dtype(content.dtype))
        entries = {"location": file, "offset": offset, "length": content.size}
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in entries.items())
        tensors.append(tensor)
        offset = -(-(offset + content.size) // ALIGNMENT) * ALIGNMENT
    return tensors


def replace_initializers(
    graph: onnx.GraphProto, plans: Mapping[str, MatrixPlan], weights: Weights, form: str
) -> dict[str, Content]:
    """Gives a graph whose nodes are rewritten the initializers that they take; returns what those with data hold."""
    nbits_blocks = {
        name: _attribute(node, "block_size")
        for node in graph.node
        for name in node.input
        if name in plans and form == CPU
    }
    contents: dict[str, Content] = {}
    small: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        name = tensor.name
        if name in plans:
            plan = plans[name]
            if form == CPU or plan.scale is None:
                contents |= _packed(plan, weights, nbits_blocks[name])
            else:
                contents |= _int8(plan, plan.scale, weights)
            if plan.input_scale is not None:
                small.append(numpy_helper.from_array(np.array(plan.input_scale, np.float32), input_scale_name(name)))
        elif tensor.external_data:
            contents[name] = _floats(name, weights)
        else:
            small.append(tensor)
    if any(ZERO in node.input for node in graph.node):
        small.append(numpy_helper.from_array(np.array(0, np.int8), ZERO))
    tensors = place(contents, DECODER_WEIGHTS) + small
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    return contents


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(item.i) for item in node.attribute if item.name == name)


def _int8(plan: MatrixPlan, scale: Vector, weights: Weights) -> dict[str, Content]:
    shape = weights.shape(plan.name)
    return {
        plan.name: Content(np.dtype(np.int8), shape, lambda: _quantized(plan, scale, weights)),
        scale_name(plan.name): Content(np.dtype("<f4"), shape[:1], lambda: [scale.astype("<f4")]),
    }


def _packed(plan: MatrixPlan, weights: Weights, size: int) -> dict[str, Content]:
    rows, columns = weights.shape(plan.name)
    count = quantize.blocks(columns, size)
    packed: Callable[[], Iterable[npt.NDArray[Any]]]
    scales: Callable[[], Iterable[npt.NDArray[Any]]]
    if plan.scale is None:
        own = _OwnScales(plan, weights, size)
        packed, scales = own.packed, own.scales
    else:
        scale = plan.scale
        packed = lambda: (quantize.pack(block, size) for block in _quantized(plan, scale, weights))  # noqa: E731
        scales = lambda: [quantize.block_scales(scale, columns, size)]  # noqa: E731
    return {
        plan.name: Content(np.dtype(np.uint8), (rows, count, size * plan.bits // 8), packed),
        scale_name(plan.name): Content(np.dtype("<f4"), (rows, count), scales),
    }


class _OwnScales:
    """A matrix whose blocks have scales of their own: both come of one reading, in this order."""

    def __init__(self, plan: MatrixPlan, weights: Weights, size: int) -> None:
        self._plan, self._weights, self._size = plan, weights, size
        self._scales: list[quantize.Floats] = []

    def packed(self) -> Iterator[npt.NDArray[np.uint8]]:
        self._scales = []
        for block in _finite(self._plan, self._weights):
            packed, scales = quantize.in_blocks(block, self._size, self._plan.bits)
            self._scales.append(scales)
            yield packed

    def scales(self) -> Iterator[npt.NDArray[Any]]:
        if not self._scales:
            for _ in self.packed():
                pass
        return iter(self._scales)


def _quantized(plan: MatrixPlan, scale: Vector, weights: Weights) -> Iterator[npt.NDArray[np.int8]]:
    start = 0
    for block in _finite(plan, weights):
        yield quantize.quantize(block, scale[start : start + len(block)])
        start += len(block)


def _finite(plan: MatrixPlan, weights: Weights) -> Iterator[quantize.Floats]:
    for block in weights.blocks(plan.name):
        if not np.isfinite(block).all():
            raise QuantizationError(f"{plan.name} holds numbers that are not finite: INT8 has none")
        yield block


def _floats(name: str, weights: Weights) -> Content:
    """A tensor that stays in its number format: as it is, or smoothed and rounded again."""
    dtype = weights.dtype(name)

    def smoothed() -> Iterator[npt.NDArray[Any]]:
        for block in weights.blocks(name):
            with np.errstate(over="ignore"):
                rounded = block.astype(dtype)
            if not np.isfinite(rounded.astype(np.float32)).all():
                raise QuantizationError(f"{name}, smoothed, does not fit {dtype}: use a bf16 or fp32 bundle")
            yield rounded

    blocks = smoothed if weights.is_smoothed(name) else lambda: weights.stored(name)
    return Content(dtype, weights.shape(name), blocks)
