"""``RotaryEmbedding``, ``TensorScatter`` and ``Attention`` → ``GroupQueryAttention`` of ONNX Runtime.

Rule: where ``Attention`` takes keys and values that ``TensorScatter`` just wrote into the caches, all that stands
between the product of query, key and value and the attention's rows becomes one node. It turns queries and keys by the
same table, writes the caches in place, and reads them only as far as they are filled, where ``Attention`` computes
scores for the whole capacity. Where the last layer takes the last row of the queries, it takes that of the node's
result.

The node takes several sequences at once when each has one row, or when their caches are empty, not otherwise. The
position of row i is ``write_indices`` + i for the node, so that ``position_ids`` is not asked for any more, and the
mask is that of causal attention: both as the runtime gives them to the graph with the standard operators.

Where a layer's caches are INT8, ``export.passes.int8_caches`` has what stands in place of the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.errors import QuantizationError
from export.passes.by_expert import prune
from export.passes.int8_caches import FEW, FEW_ROWS, POSITIONS, CachePlan, check_caches, over_int8, store_in_int8
from plugins_trt.function import CPU_DOMAIN
from runtime.backends.graph import INPUTS_EMBEDS, PAST, POSITION_IDS, WRITE_INDICES
from runtime.bundle.manifest import ModelFacts

_LAST_KEY, _LENGTH = "attention.last_key", "attention.length"
"""Inputs that all layers share, int32: index of each sequence's last key, [batch], and tokens of the longest."""


def group_query_attention(model: onnx.ModelProto, facts: ModelFacts, caches: Sequence[CachePlan] = ()) -> None:
    """Rewrites every attention of a decoder, in place; one that has none of opset 24 stays as it is.

    Args:
        model: the decoder.
        facts: of it.
        caches: those to store in INT8.

    Raises:
        QuantizationError: attention of another form, or plans of caches that do not fit.
    """
    graph, int8 = model.graph, check_caches(caches, facts)
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    if not attentions:
        assert not caches  # noqa: S101 - export.quantized.bundle.check_source refuses graphs of older operators
        return
    made_by = {output: node for node in graph.node for output in node.output}
    used_by = {name: node for node in graph.node for name in node.input}
    replaced: dict[str, list[onnx.NodeProto]] = {}
    dropped: set[str] = set()
    for attention in attentions:
        nodes, gone = _node(attention, made_by, used_by, facts)
        plan = int8.get(int(nodes[0].input[3].removeprefix(PAST).split(".")[0]))
        replaced[attention.name] = nodes if plan is None else [over_int8(nodes[0], plan), *nodes[1:]]
        dropped |= gone
    nodes = _shared()
    for node in graph.node:
        if node.name in replaced:
            nodes += replaced[node.name]
        elif node.name not in dropped:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    if caches:
        store_in_int8(model, caches, facts)
    prune(graph)


def _node(
    attention: onnx.NodeProto,
    made_by: dict[str, onnx.NodeProto],
    used_by: dict[str, onnx.NodeProto],
    facts: ModelFacts,
) -> tuple[list[onnx.NodeProto], set[str]]:
    """What stands in place of one attention, and the names of the nodes that it replaces and that give outputs."""

    def producer(name: str, op_type: str) -> onnx.NodeProto:
        node = made_by.get(name)
        if node is None or node.op_type != op_type:
            raise QuantizationError(
                f"{attention.name} is not attention over caches as this monoedge exports it: export the bundle again"
            )
        return node

    key, value = producer(attention.input[1], "TensorScatter"), producer(attention.input[2], "TensorScatter")
    query = producer(attention.input[0], "RotaryEmbedding")
    _, cos, sin, positions = query.input
    heads = producer(producer(value.input[1], "Slice").input[0], "Transpose")
    rows = producer(heads.input[0], "Reshape").input[0]
    turned = producer(key.input[1], "RotaryEmbedding")
    if producer(turned.input[0], "Slice").input[0] != heads.output[0] or turned.input[1:3] != [cos, sin]:
        raise QuantizationError(f"{attention.name}: keys and values come from elsewhere: export the bundle again")
    merged = used_by[used_by[attention.output[0]].output[0]]
    if merged.op_type != "Reshape":
        raise QuantizationError(f"{attention.name}: {merged.op_type} follows: export the bundle again")
    result = merged.output[0]
    node = helper.make_node(
        "GroupQueryAttention",
        [rows, "", "", key.input[0], value.input[0], _LAST_KEY, _LENGTH, cos, sin],
        [result, key.output[0], value.output[0]],
        name=attention.name.replace("Attention", "GroupQueryAttention"),
        domain=CPU_DOMAIN,
        num_heads=facts.num_attention_heads,
        kv_num_heads=facts.num_key_value_heads,
        do_rotary=1,
        rotary_interleaved=0,
        scale=next(item.f for item in attention.attribute if item.name == "scale"),
    )
    nodes = [node]
    if positions != POSITION_IDS:
        # The last row: positions are sliced along the sequence, as the result has to be.
        last = producer(positions, "Slice")
        node.output[0] = f"{result}.all"
        nodes.append(
            helper.make_node("Slice", [node.output[0], *last.input[1:]], [result], name=f"{node.name}.last_row")
        )
    return nodes, {key.name, value.name, merged.name}


def _shared() -> list[onnx.NodeProto]:
    def constant(name: str, value: int | list[int]) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(np.array(value, np.int64))
        return helper.make_node("Constant", [], [name], name=name, value=tensor)

    def node(op_type: str, inputs: list[str], result: str, **attributes: Any) -> onnx.NodeProto:  # noqa: ANN401
        return helper.make_node(op_type, inputs, [result], name=result, **attributes)

    count = "attention.count"
    return [
        node("Shape", [INPUTS_EMBEDS], f"{count}.shape", start=1, end=2),
        constant("attention.one", 1),
        node("Sub", [f"{count}.shape", "attention.one"], f"{count}.before"),
        node("Add", [WRITE_INDICES, f"{count}.before"], f"{_LAST_KEY}.wide"),
        node("Cast", [f"{_LAST_KEY}.wide"], _LAST_KEY, to=TensorProto.INT32),
        node("Add", [f"{_LAST_KEY}.wide", "attention.one"], f"{_LENGTH}.each"),
        node("ReduceMax", [f"{_LENGTH}.each"], f"{_LENGTH}.wide", keepdims=0),
        node("Cast", [f"{_LENGTH}.wide"], _LENGTH, to=TensorProto.INT32),
        # What only INT8 caches ask for; taken out where there are none.
        constant(f"{FEW_ROWS}.most", FEW),
        node("LessOrEqual", [f"{count}.shape", f"{FEW_ROWS}.most"], FEW_ROWS),
        constant("attention.zero", 0),
        constant("attention.column", [-1, 1]),
        node("Squeeze", [f"{count}.shape"], f"{count}.number"),
        node("Range", ["attention.zero", f"{count}.number", "attention.one"], f"{POSITIONS}.steps"),
        node("Reshape", [WRITE_INDICES, "attention.column"], f"{POSITIONS}.first"),
        node("Add", [f"{POSITIONS}.first", f"{POSITIONS}.steps"], POSITIONS),
    ]
