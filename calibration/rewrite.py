"""The decoder's graph with some matrices in INT8, and what its initializers then hold.

Two forms. ``qdq`` says the arithmetic in ONNX's own operators, for TensorRT and as the reference on any runtime;
``cpu`` uses ONNX Runtime's ``MatMulNBits``, with the same INT8 numbers and scales. In both, a node of an expert
operator becomes the quantized form of it, whose body goes into the model; a ``Gemm`` gets ``DequantizeLinear`` in
front, or becomes ``MatMulNBits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration import quantize
from calibration.errors import CalibrationError
from calibration.plan import MatrixPlan, QuantizationPlan, Vector
from calibration.weights import Weights
from plugins_trt import function
from plugins_trt.schema import ALL_OPERATORS, DOMAIN, EXPERTS, FLOAT, MATRICES, NBITS, W8A8, W8A16, Operator
from runtime.bundle import CPU, DECODER_WEIGHTS
from runtime.bundle_writer import ALIGNMENT


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


@dataclass(frozen=True)
class Rewritten:
    """A graph whose initializers have no data, and the data by name, in the graph's order."""

    model: onnx.ModelProto
    contents: dict[str, Content]


def rewrite(weights: Weights, plan: QuantizationPlan, form: str) -> Rewritten:
    """The quantized decoder.

    Args:
        weights: of the decoder that is not quantized, smoothed as the plan says.
        plan: what to quantize; in form ``cpu`` that may be nothing.
        form: ``qdq`` or ``cpu``; the latter takes no ``input_scale``.

    Raises:
        CalibrationError: a plan that does not fit the decoder.
    """
    plans = _checked(weights, plan, form)
    model = onnx.ModelProto()
    model.CopyFrom(weights.model)
    graph = model.graph
    nodes = [new for node in graph.node for new in _rewrite_node(node, plans, weights, form)]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    others = [body for body in model.functions if body.domain != DOMAIN]
    del model.functions[:]
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    model.functions.extend([*function.bodies(used, opset), *others])
    contents = _replace_initializers(graph, plans, weights, form)
    # Exporters note the types of initializers too.
    noted = [value for value in graph.value_info if value.name not in plans]
    del graph.value_info[:]
    graph.value_info.extend(noted)
    if form == CPU:
        model.opset_import.append(helper.make_opsetid(function.CPU_DOMAIN, 1))
        if plans:
            _keep_from_prepacking(graph)
    return Rewritten(model, contents)


def scale_name(matrix: str) -> str:
    """Name of the initializer with a matrix's scales."""
    return f"{matrix}_scale"


def input_scale_name(matrix: str) -> str:
    """Name of the initializer with the scale of the activations in front of a matrix."""
    return f"{matrix}_input_scale"


def _checked(weights: Weights, plan: QuantizationPlan, form: str) -> dict[str, MatrixPlan]:
    if not plan.matrices and form != CPU:
        raise CalibrationError("nothing is to be quantized")
    plans = {matrix.name: matrix for matrix in plan.matrices}
    if len(plans) != len(plan.matrices):
        raise CalibrationError("a matrix is planned twice")
    consumed = {name for node in weights.model.graph.node for name in _matrices(node).values()}
    for matrix in plan.matrices:
        shape = weights.shape(matrix.name)
        if matrix.name not in consumed:
            raise CalibrationError(f"{matrix.name} is no matrix that can be quantized")
        if matrix.scale is None:
            if form != CPU:
                raise CalibrationError(f"{matrix.name}: in form {form} a matrix needs scales, one a row")
        elif matrix.bits != 8:
            raise CalibrationError(f"{matrix.name}: {matrix.bits} bits have a scale a block, not a row")
        elif matrix.scale.shape != shape[:1] or not (np.isfinite(matrix.scale) & (matrix.scale > 0)).all():
            raise CalibrationError(
                f"{matrix.name}: scale should be {shape[0]} positive numbers, got {matrix.scale.shape} from "
                f"{matrix.scale.min()}"
            )
        if (matrix.input_scale is not None) != (plan.mode == W8A8):
            raise CalibrationError(f"{matrix.name}: input_scale is {matrix.input_scale}, and the mode is {plan.mode}")
        if matrix.input_scale is not None and not 0 < matrix.input_scale < np.inf:
            raise CalibrationError(f"{matrix.name}: input_scale should be positive, got {matrix.input_scale}")
    return plans


def _matrices(node: onnx.NodeProto) -> dict[str, str]:
    """The matrices of a node that can be quantized: initializers by their name in the operator; empty for a Gemm."""
    if node.domain == DOMAIN:
        operator = _operator(node)
        names = [tensor.name for tensor in operator.inputs]
        matrices = {f"{expert}_{matrix}" for expert in EXPERTS for matrix in MATRICES[operator.family]}
        return {name: given for name, given in zip(names, node.input, strict=True) if name in matrices}
    if node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute):
        return {"": node.input[1]}
    return {}


def _operator(node: onnx.NodeProto) -> Operator:
    return next(operator for operator in ALL_OPERATORS if operator.name == node.op_type)


def _rewrite_node(
    node: onnx.NodeProto, plans: dict[str, MatrixPlan], weights: Weights, form: str
) -> Iterator[onnx.NodeProto]:
    planned = {name: plans[given] for name, given in _matrices(node).items() if given in plans}
    if not planned:
        yield node
    elif node.domain == DOMAIN:
        yield _expert_node(node, planned, weights, form)
    elif form == CPU:
        yield _nbits_node(node, planned[""], weights)
    else:
        yield from _dequantized(node, planned[""], weights)


def _expert_node(node: onnx.NodeProto, planned: dict[str, MatrixPlan], weights: Weights, form: str) -> onnx.NodeProto:
    operator = _operator(node)
    matrices = MATRICES[operator.family]
    kind = NBITS if form == CPU else W8A8 if any(plan.input_scale is not None for plan in planned.values()) else W8A16
    formats = {}
    for expert in EXPERTS:
        missing = [name for name in matrices if f"{expert}_{name}" not in planned]
        if 0 < len(missing) < len(matrices):
            raise CalibrationError(f"{node.name}: the {expert} expert's {missing[0]} is missing in the plan")
        formats[expert] = FLOAT if missing else kind
    form_of = {(item.family, item.text, item.visual): item for item in ALL_OPERATORS}
    quantized = form_of.get((operator.family, formats["text"], formats["visual"]))
    if quantized is None:
        raise CalibrationError(f"{node.name}: the visual expert is quantized together with the text expert, not alone")
    given = dict(zip((tensor.name for tensor in operator.inputs), node.input, strict=True))
    for name, plan in planned.items():
        given[scale_name(name)] = scale_name(plan.name)
        given[input_scale_name(name)] = input_scale_name(plan.name)
    result = helper.make_node(
        quantized.name,
        [given[tensor.name] for tensor in quantized.inputs],
        list(node.output),
        name=node.name.replace(operator.name, quantized.name),
        domain=DOMAIN,
        **quantized.attributes,
    )
    if quantized.size_attributes:
        shapes = {matrix: weights.shape(given[f"text_{matrix}"]) for matrix in matrices}
        sizes = {f"{name}_rows": shape[0] for name, shape in shapes.items()}
        sizes |= {f"{name}_columns": shape[1] for name, shape in shapes.items()}
        bits = {plan.bits for plan in planned.values()}
        if len(bits) > 1:
            raise CalibrationError(f"{node.name}: all its matrices have the same number of bits, got {sorted(bits)}")
        sizes |= {"bits": bits.pop(), "block_size": _block_size(node, planned, weights)}
        result.attribute.extend(helper.make_attribute(name, sizes[name]) for name in quantized.size_attributes)
    return result


def _block_size(node: onnx.NodeProto, planned: dict[str, MatrixPlan], weights: Weights) -> int:
    """One for all matrices of a node, since it is an attribute: that of the narrowest."""
    narrowest = min(weights.shape(name)[1] for name in _matrices(node).values())
    return quantize.block_size(narrowest, min(plan.bits for plan in planned.values()))


def _nbits_node(node: onnx.NodeProto, plan: MatrixPlan, weights: Weights) -> onnx.NodeProto:
    rows, columns = weights.shape(plan.name)
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], plan.name, scale_name(plan.name)],
        list(node.output),
        name=node.name.replace("Gemm", "MatMulNBits"),
        domain=function.CPU_DOMAIN,
        K=columns,
        N=rows,
        bits=plan.bits,
        block_size=_block_size(node, {"": plan}, weights),
        accuracy_level=function.ACCURACY_LEVEL,
    )


def _dequantized(node: onnx.NodeProto, plan: MatrixPlan, weights: Weights) -> Iterator[onnx.NodeProto]:
    """A Gemm over the values that INT8 stands for.

    w8a16: they are rounded to the graph's type, in which the Gemm stays. w8a8: the Gemm is in float32, as which a
    product of INT8 values states itself exactly; runtimes compute it in integers.
    """
    element = helper.np_dtype_to_tensor_dtype(weights.dtype(plan.name))
    rows, values = node.input[0], f"{plan.name}_values"
    wide = element == TensorProto.FLOAT

    def cast(given: str, result: str, to: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [given], [result], name=f"{node.name}/Cast:{result}", to=to)

    def linear(op_type: str, inputs: list[str], result: str) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs, [result], name=f"{node.name}/{op_type}:{result}")

    matrix = linear("DequantizeLinear", [plan.name, scale_name(plan.name)], values)
    matrix.attribute.append(helper.make_attribute("axis", 0))
    yield matrix
    if plan.input_scale is None:
        if not wide:
            yield cast(values, f"{values}_rounded", element)
            values = f"{values}_rounded"
        yield _like(node, [rows, values], node.output[0])
        return
    scale = input_scale_name(plan.name)
    if not wide:
        yield cast(rows, f"{plan.name}_rows_wide", TensorProto.FLOAT)
        rows = f"{plan.name}_rows_wide"
    yield linear("QuantizeLinear", [rows, scale, _ZERO], f"{plan.name}_rows_int8")
    yield linear("DequantizeLinear", [f"{plan.name}_rows_int8", scale, _ZERO], f"{plan.name}_rows_values")
    sums = node.output[0] if wide else f"{plan.name}_sums"
    yield _like(node, [f"{plan.name}_rows_values", values], sums)
    if not wide:
        yield cast(sums, node.output[0], element)


def _like(node: onnx.NodeProto, inputs: list[str], result: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.append(result)
    return copy


_ZERO = "int8_zero"
"""The zero point of everything, as an initializer."""


def _replace_initializers(
    graph: onnx.GraphProto, plans: dict[str, MatrixPlan], weights: Weights, form: str
) -> dict[str, Content]:
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
    if any(_ZERO in node.input for node in graph.node):
        small.append(numpy_helper.from_array(np.array(0, np.int8), _ZERO))
    tensors = place(contents, DECODER_WEIGHTS) + small
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    return contents


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
            raise CalibrationError(f"{plan.name} holds numbers that are not finite: INT8 has none")
        yield block


def _floats(name: str, weights: Weights) -> Content:
    """A tensor that stays in its number format: as it is, or smoothed and rounded again."""
    dtype = weights.dtype(name)

    def smoothed() -> Iterator[npt.NDArray[Any]]:
        for block in weights.blocks(name):
            with np.errstate(over="ignore"):
                rounded = block.astype(dtype)
            if not np.isfinite(rounded.astype(np.float32)).all():
                raise CalibrationError(f"{name}, smoothed, does not fit {dtype}: use a bf16 or fp32 bundle")
            yield rounded

    blocks = smoothed if weights.is_smoothed(name) else lambda: weights.stored(name)
    return Content(dtype, weights.shape(name), blocks)


def _keep_from_prepacking(graph: onnx.GraphProto) -> None:
    """Makes float matrices inputs of the graph too, with what they hold as default.

    ONNX Runtime copies constant matrices of every ``Gemm`` into a layout of its own, which costs their size in memory;
    it is only where ``MatMulNBits`` stands beside them that this cannot be switched off altogether
    (``runtime.backends.onnxruntime``). What is an input might change, so it is left where it is: in the mapped file.
    """
    known = {tensor.name: tensor for tensor in graph.initializer}
    matrices = (name for node in graph.node for name in _matrices(node).values() if name in known)
    for name in dict.fromkeys(matrices):
        tensor = known[name]
        if tensor.data_type != TensorProto.UINT8:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
