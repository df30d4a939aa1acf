"""The decoder's graphs with some matrices in integers.

There are two forms. ``qdq`` states the arithmetic in ONNX's own operators, for TensorRT and as the reference on any
runtime. ``cpu`` uses ONNX Runtime's ``MatMulNBits``, with the same INT8 numbers and scales. In both, a node of an
expert operator becomes the quantized form of it, whose body goes into the model. ``export.quantized.nodes`` has the
nodes, ``export.quantized.initializers`` the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from export.errors import QuantizationError
from export.external_data import GraphFile, TensorSource, layout
from export.passes.by_expert import keep_expert
from export.passes.group_query_attention import group_query_attention
from export.quantized.initializers import initializers
from export.quantized.nodes import matrices_of, rewrite_node
from export.quantized.plan import MatrixPlan, QuantizationPlan
from export.quantized.weights import Weights
from plugins_trt import function
from plugins_trt.schema import DOMAIN, EXPERTS, W8A8
from runtime.bundle.manifest import CPU, DECODER_GRAPH, DECODER_WEIGHTS, VISUAL_DECODER_GRAPH, ModelFacts


def decoder_files(weights: Weights, plan: QuantizationPlan, form: str, facts: ModelFacts) -> list[GraphFile]:
    """Returns the graphs of a quantized decoder.

    In form ``cpu`` each kind of tokens has a graph with its own experts alone (``export.passes.by_expert``), so that a
    conversation of text never opens the visual experts' weights: ONNX Runtime copies what ``MatMulNBits`` takes into a
    layout of its own, all of it, when it opens a graph. What both use lies in the text decoder's file.

    Args:
        weights: of the decoder that is not quantized, smoothed as the plan says.
        plan: what to quantize; in form ``cpu`` that may be nothing.
        form: ``qdq`` or ``cpu``; only the latter takes ``caches``, and it takes no ``input_scale``.
        facts: of the model.

    Raises:
        QuantizationError: a plan that does not fit the decoder, or a decoder that this monoedge did not export.
    """
    model, tensors = _rewrite(weights, plan, form)
    if form != CPU:
        return [GraphFile(DECODER_GRAPH, model, tensors)]
    whole = ir.from_proto(model)
    group_query_attention(whole, facts, plan.caches)
    text, visual = (ir.to_proto(keep_expert(whole, expert)) for expert in EXPERTS)
    first = _placed(DECODER_GRAPH, text, tensors, {})
    shared = {tensor.name: tensor for tensor in text.graph.initializer}
    return [first, _placed(VISUAL_DECODER_GRAPH, visual, tensors, shared)]


def _placed(
    name: str, model: onnx.ModelProto, tensors: Mapping[str, TensorSource], elsewhere: Mapping[str, onnx.TensorProto]
) -> GraphFile:
    """Places those tensors of a graph in its own file that are not elsewhere already."""
    initializers = model.graph.initializer
    kept = [item.name for item in initializers if item.name in tensors and item.name not in elsewhere]
    file = GraphFile(name, model, {item: tensors[item] for item in kept})
    placed = {**layout(file.tensors, file.weights), **elsewhere}
    _put(initializers, (placed.get(item.name, item) for item in initializers))
    return file


def _put(field: Any, items: Iterable[Any]) -> None:  # noqa: ANN401 - a repeated field of protobuf
    """Replaces what a field of a graph holds."""
    kept = list(items)
    del field[:]
    field.extend(kept)


def _rewrite(weights: Weights, plan: QuantizationPlan, form: str) -> tuple[onnx.ModelProto, dict[str, TensorSource]]:
    """Returns one graph for both kinds of tokens, and what its initializers hold."""
    plans = _checked(weights, plan, form)
    model = onnx.ModelProto()
    model.CopyFrom(weights.model)
    graph = model.graph
    nodes = [new for node in graph.node for new in rewrite_node(node, plans, weights, form)]
    _put(graph.node, nodes)
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    others = [body for body in model.functions if body.domain != DOMAIN]
    _put(model.functions, [*function.bodies(used, function.opset_of(model)), *others])
    tensors, small = initializers(graph, plans, weights, form)
    _put(graph.initializer, [*layout(tensors, DECODER_WEIGHTS).values(), *small])
    # Exporters note the types of initializers too.
    _put(graph.value_info, (value for value in graph.value_info if value.name not in plans))
    if form == CPU:
        model.opset_import.append(helper.make_opsetid(function.CPU_DOMAIN, 1))
        if plans:
            _keep_from_prepacking(graph)
    return model, tensors


def _checked(weights: Weights, plan: QuantizationPlan, form: str) -> dict[str, MatrixPlan]:
    if not plan.matrices and form != CPU:
        raise QuantizationError("nothing is to be quantized")
    plans = {matrix.name: matrix for matrix in plan.matrices}
    if len(plans) != len(plan.matrices):
        raise QuantizationError("a matrix is planned twice")
    consumed = {name for node in weights.model.graph.node for name in matrices_of(node).values()}
    for matrix in plan.matrices:
        shape = weights.shape(matrix.name)
        if matrix.name not in consumed:
            raise QuantizationError(f"{matrix.name} is no matrix that can be quantized")
        if matrix.scale is None:
            if form != CPU:
                raise QuantizationError(f"{matrix.name}: in form {form} a matrix needs scales, one a row")
        elif matrix.bits != 8:
            raise QuantizationError(f"{matrix.name}: {matrix.bits} bits have a scale a block, not a row")
        elif matrix.scale.shape != shape[:1] or not (np.isfinite(matrix.scale) & (matrix.scale > 0)).all():
            got = f"{matrix.scale.shape} from {matrix.scale.min()}"
            raise QuantizationError(f"{matrix.name}: scale should be {shape[0]} positive numbers, got {got}")
        if (matrix.input_scale is not None) != (plan.mode == W8A8):
            raise QuantizationError(f"{matrix.name}: input_scale is {matrix.input_scale}, and the mode is {plan.mode}")
        if matrix.input_scale is not None and not 0 < matrix.input_scale < np.inf:
            raise QuantizationError(f"{matrix.name}: input_scale should be positive, got {matrix.input_scale}")
    return plans


def _keep_from_prepacking(graph: onnx.GraphProto) -> None:
    """Makes float matrices inputs of the graph too, with what they hold as default.

    ONNX Runtime copies constant matrices of every ``Gemm`` into a layout of its own, which costs their size in memory;
    it is only where ``MatMulNBits`` stands beside them that this cannot be switched off altogether
    (``runtime.backends.onnxruntime.backend``). What is an input might change, so it is left where it is: in the mapped
    file.
    """
    known = {tensor.name: tensor for tensor in graph.initializer}
    matrices = (name for node in graph.node for name in matrices_of(node).values() if name in known)
    for name in dict.fromkeys(matrices):
        tensor = known[name]
        if tensor.data_type != TensorProto.UINT8:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
