"""The initializers of a quantized decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from export.errors import QuantizationError
from export.external_data import TensorSource
from export.quantized import quantize
from export.quantized.nodes import ZERO, input_scale_name, scale_name
from export.quantized.plan import MatrixPlan, Vector
from export.quantized.weights import Weights
from runtime.bundle.manifest import CPU

_FLOAT32, _INT8, _UINT8 = np.dtype("<f4"), np.dtype(np.int8), np.dtype(np.uint8)


def initializers(
    graph: onnx.GraphProto, plans: Mapping[str, MatrixPlan], weights: Weights, form: str
) -> tuple[dict[str, TensorSource], list[onnx.TensorProto]]:
    """Returns the initializers of a graph whose nodes are rewritten: those that lie in a file, and those in the graph.

    The graph still has the initializers of the decoder that is not quantized; ``plans`` are by their names.
    """
    block_sizes = {
        name: next(int(item.i) for item in node.attribute if item.name == "block_size")
        for node in graph.node
        for name in node.input
        if name in plans and form == CPU
    }
    sources: dict[str, TensorSource] = {}
    small: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        name = tensor.name
        if name in plans:
            plan = plans[name]
            if form == CPU or plan.scale is None:
                sources |= _packed(plan, weights, block_sizes[name])
            else:
                sources |= _int8(plan, plan.scale, weights)
            if plan.input_scale is not None:
                small.append(numpy_helper.from_array(np.array(plan.input_scale, np.float32), input_scale_name(name)))
        elif tensor.external_data:
            sources[name] = _float(name, weights)
        else:
            small.append(tensor)
    if any(ZERO in node.input for node in graph.node):
        small.append(numpy_helper.from_array(np.array(0, np.int8), ZERO))
    return sources, small


def _int8(plan: MatrixPlan, scale: Vector, weights: Weights) -> dict[str, TensorSource]:
    """Returns a matrix as ``DequantizeLinear`` takes it, with a scale for each row."""
    shape = weights.shape(plan.name)

    def numbers() -> Iterator[npt.NDArray[Any]]:
        for rows, block in _finite(plan, weights):
            yield quantize.quantize(block, scale[rows])

    return {
        plan.name: TensorSource(_INT8, shape, numbers),
        scale_name(plan.name): TensorSource(_FLOAT32, shape[:1], lambda: [scale]),
    }


def _packed(plan: MatrixPlan, weights: Weights, size: int) -> dict[str, TensorSource]:
    """Returns a matrix as ``MatMulNBits`` takes it, with a scale for each block of a row. Both come of one reading."""
    rows, columns = weights.shape(plan.name)
    count = quantize.blocks(columns, size)
    kept: list[quantize.Floats] = []

    def numbers() -> Iterator[npt.NDArray[Any]]:
        kept.clear()
        for rows, block in _finite(plan, weights):
            if plan.scale is None:
                packed, scales = quantize.in_blocks(block, size, plan.bits)
            else:
                packed = quantize.pack(quantize.quantize(block, plan.scale[rows]), size)
                scales = quantize.block_scales(plan.scale[rows], columns, size)
            kept.append(scales)
            yield packed

    def scales() -> Iterator[npt.NDArray[Any]]:
        if not kept:
            for _ in numbers():
                pass
        while kept:
            yield kept.pop(0)

    return {
        plan.name: TensorSource(_UINT8, (rows, count, size * plan.bits // 8), numbers),
        scale_name(plan.name): TensorSource(_FLOAT32, (rows, count), scales),
    }


def _float(name: str, weights: Weights) -> TensorSource:
    """Returns a tensor that keeps its number format: as it is, or smoothed and rounded again."""
    source = weights.source(name)

    def smoothed() -> Iterator[npt.NDArray[Any]]:
        for block in weights.blocks(name):
            with np.errstate(over="ignore"):
                rounded = block.astype(source.dtype)
            if not np.isfinite(rounded.astype(np.float32)).all():
                raise QuantizationError(f"{name}, smoothed, does not fit {source.dtype}: use a bf16 or fp32 bundle")
            yield rounded

    return TensorSource(source.dtype, source.shape, smoothed) if weights.is_smoothed(name) else source


def _finite(plan: MatrixPlan, weights: Weights) -> Iterator[tuple[slice, quantize.Floats]]:
    """Yields rows of a matrix, with their numbers."""
    start = 0
    for block in weights.blocks(plan.name):
        if not np.isfinite(block).all():
            raise QuantizationError(f"{plan.name} holds NaN or infinite values: export the bundle again")
        yield slice(start, start + len(block)), block
        start += len(block)
