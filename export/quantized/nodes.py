"""The nodes of a decoder whose matrices are INT8.

A node of an expert operator becomes the quantized form of it. A ``Gemm`` gets ``DequantizeLinear`` in front in form
``qdq``, and becomes ``MatMulNBits`` in form ``cpu``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

from export.errors import QuantizationError
from export.quantized import quantize
from export.quantized.plan import MatrixPlan
from export.quantized.weights import Weights
from plugins_trt import function
from plugins_trt.schema import ALL_OPERATORS, DOMAIN, EXPERTS, FLOAT, MATRICES, NBITS, W8A8, W8A16, Operator
from runtime.bundle.manifest import CPU

ZERO = "int8_zero"
"""Name of the initializer that is every zero point."""


def scale_name(matrix: str) -> str:
    """Returns the name of the initializer with a matrix's scales."""
    return f"{matrix}_scale"


def input_scale_name(matrix: str) -> str:
    """Returns the name of the initializer with the scale of a matrix's input."""
    return f"{matrix}_input_scale"


def matrices_of(node: onnx.NodeProto) -> dict[str, str]:
    """Returns the initializers of a node that can be quantized, by their names in the operator; "" for a Gemm's."""
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


def rewrite_node(
    node: onnx.NodeProto, plans: Mapping[str, MatrixPlan], weights: Weights, form: str
) -> Iterator[onnx.NodeProto]:
    """Yields what stands in place of a node: the node itself, unless one of its matrices is planned.

    Raises:
        QuantizationError: a plan that does not fit it.
    """
    planned = {name: plans[given] for name, given in matrices_of(node).items() if given in plans}
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
            raise QuantizationError(f"{node.name}: the {expert} expert's {missing[0]} is missing in the plan")
        formats[expert] = FLOAT if missing else kind
    form_of = {(item.family, item.text, item.visual): item for item in ALL_OPERATORS}
    quantized = form_of.get((operator.family, formats["text"], formats["visual"]))
    if quantized is None:
        raise QuantizationError(f"{node.name}: the visual expert is quantized together with the text expert, not alone")
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
            raise QuantizationError(f"{node.name}: all its matrices have the same number of bits, got {sorted(bits)}")
        sizes |= {"bits": bits.pop(), "block_size": _block_size(node, planned, weights)}
        result.attribute.extend(helper.make_attribute(name, sizes[name]) for name in quantized.size_attributes)
    return result


def _block_size(node: onnx.NodeProto, planned: dict[str, MatrixPlan], weights: Weights) -> int:
    """Returns one block size for all matrices of a node, since it is an attribute: that of the narrowest."""
    narrowest = min(weights.shape(name)[1] for name in matrices_of(node).values())
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
    """Yields a Gemm over the values that INT8 stands for.

    w8a16: they are rounded to the graph's type, in which the Gemm stays. w8a8: the Gemm is in float32, as which a
    product of INT8 values states itself exactly; runtimes compute it in integers.
    """
    element = helper.np_dtype_to_tensor_dtype(weights.source(plan.name).dtype)
    rows, values = node.input[0], f"{plan.name}_values"
    wide = element == TensorProto.FLOAT

    def step(op_type: str, inputs: list[str], result: str, **attributes: Any) -> onnx.NodeProto:  # noqa: ANN401
        return helper.make_node(op_type, inputs, [result], name=f"{node.name}/{op_type}:{result}", **attributes)

    yield step("DequantizeLinear", [plan.name, scale_name(plan.name)], values, axis=0)
    if plan.input_scale is None:
        if not wide:
            yield step("Cast", [values], f"{values}_rounded", to=element)
            values = f"{values}_rounded"
        yield _like(node, [rows, values], node.output[0])
        return
    scale = input_scale_name(plan.name)
    if not wide:
        yield step("Cast", [rows], f"{plan.name}_rows_wide", to=TensorProto.FLOAT)
        rows = f"{plan.name}_rows_wide"
    yield step("QuantizeLinear", [rows, scale, ZERO], f"{plan.name}_rows_int8")
    yield step("DequantizeLinear", [f"{plan.name}_rows_int8", scale, ZERO], f"{plan.name}_rows_values")
    sums = node.output[0] if wide else f"{plan.name}_sums"
    yield _like(node, [f"{plan.name}_rows_values", values], sums)
    if not wide:
        yield step("Cast", [sums], node.output[0], to=element)


def _like(node: onnx.NodeProto, inputs: list[str], result: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:], copy.output[:] = inputs, [result]
    return copy
