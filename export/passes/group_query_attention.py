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

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from export.passes.int8_caches import DOMAIN, FEW, NAME, CachePlan, body, check_caches, scale_values
from export.passes.nodes import inputs, insert_before, nodes_of, parse, producer, remove_unused, strange
from plugins_trt.function import CPU_DOMAIN
from runtime.backends.graph import INPUTS_EMBEDS, PAST, POSITION_IDS, WRITE_INDICES
from runtime.bundle.manifest import ModelFacts

# What all layers share. int32: index of each sequence's last key, [batch], and tokens of the longest. The rest is only
# for INT8 caches, and is removed where there are none: whether the rows are few, bool [1], and their positions, int64
# [batch, sequence].
_SIGNATURE = "(inputs_embeds, write_indices) => (last_key, length, few_rows, positions)"
_SHARED = f"""
    "count.shape" = Shape <end = 2, start = 1> (inputs_embeds)
    one = Constant <value = int64 {{1}}> ()
    "count.before" = Sub ("count.shape", one)
    "last_key.wide" = Add (write_indices, "count.before")
    last_key = Cast <to = 6> ("last_key.wide")
    "length.each" = Add ("last_key.wide", one)
    "length.wide" = ReduceMax <keepdims = 0> ("length.each")
    length = Cast <to = 6> ("length.wide")
    "few_rows.most" = Constant <value = int64 {{{FEW}}}> ()
    few_rows = LessOrEqual ("count.shape", "few_rows.most")
    zero = Constant <value = int64 {{0}}> ()
    column = Constant <value = int64[2] {{-1, 1}}> ()
    "count.number" = Squeeze ("count.shape")
    "positions.steps" = Range (zero, "count.number", one)
    "positions.first" = Reshape (write_indices, column)
    positions = Add ("positions.first", "positions.steps")
"""


def group_query_attention(model: ir.Model, facts: ModelFacts, caches: Sequence[CachePlan]) -> None:
    """Rewrites every attention of a decoder, in place; one that has none of opset 24 stays as it is.

    The decoder has both experts. Caches are planned where they are to be INT8.

    Raises:
        QuantizationError: plans of caches do not fit.
        BundleError: attention has another form.
    """
    int8 = check_caches(caches, facts)
    attentions = nodes_of(model, "Attention")
    if not attentions:
        assert not int8  # noqa: S101 - export.quantized.bundle.check_source refuses graphs of older operators
        return
    given = {value.name: value for value in model.graph.inputs}
    sources = [given[INPUTS_EMBEDS], given[WRITE_INDICES]]
    shared = insert_before(model.graph[0], parse(_SIGNATURE, _SHARED), sources, "attention")
    for attention in attentions:
        _rewrite(model.graph, attention, [*shared, given[WRITE_INDICES]], facts, int8)
    if int8:
        function = ir.serde.deserialize_function(body(facts, model.opset_imports[""]))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
    remove_unused(model)


def _rewrite(
    graph: ir.Graph, attention: ir.Node, shared: Sequence[ir.Value], facts: ModelFacts, int8: Mapping[int, CachePlan]
) -> None:
    """Rewrites one attention; ``int8`` has the plans of caches by layer."""
    last_key, length, *asked = shared
    query, key, value, _ = inputs(attention, 4)
    scatters = [producer(cache, "TensorScatter", attention) for cache in (key, value)]
    (past_key, new_key, _), (past_value, new_value, _) = (inputs(scatter, 3) for scatter in scatters)
    _, cos, sin, positions = inputs(producer(query, "RotaryEmbedding", attention), 4)
    plain_key, *tables, _ = inputs(producer(new_key, "RotaryEmbedding", attention), 4)
    key_source, value_source = (producer(part, "Slice", attention).inputs[0] for part in (plain_key, new_value))
    heads = producer(value_source, "Transpose", attention).inputs[0]
    rows = producer(heads, "Reshape", attention).inputs[0]
    merged = attention.successors()[0].successors()[0]
    if key_source is not value_source or tables != [cos, sin] or merged.op_type != "Reshape":
        raise strange(attention)
    scale = attention.attributes["scale"].as_float()
    name = str(attention.name).replace("Attention", "GroupQueryAttention")
    plan = int8.get(int(str(past_key.name).removeprefix(PAST).split(".")[0]))
    given = [past_key, past_value, last_key, length, cos, sin]
    if plan is None:
        sizes = {"kv_num_heads": facts.num_key_value_heads, "num_heads": facts.num_attention_heads}
        fixed = {"do_rotary": 1, **sizes, "rotary_interleaved": 0, "scale": scale}
        node = ir.node(
            "GroupQueryAttention", [rows, None, None, *given], fixed, domain=CPU_DOMAIN, num_outputs=3, name=name
        )
    else:
        given[2:2] = scale_values(graph, plan)
        for cache in (past_key, past_value, key, value):
            cache.dtype = ir.DataType.INT8
        node = ir.node(NAME, [rows, *given, *asked], {"scale": scale}, domain=DOMAIN, num_outputs=3, name=name)
    nodes, (result, *presents) = [node], node.outputs
    if positions.name != POSITION_IDS:
        # The last row: positions are sliced along the sequence, as the result has to be.
        result.name = f"{merged.outputs[0].name}.all"
        sliced = [result, *producer(positions, "Slice", attention).inputs[1:]]
        nodes.append(ir.node("Slice", sliced, name=f"{name}.last_row"))
        result = nodes[1].outputs[0]
    ir.convenience.replace_nodes_and_values(
        graph, attention, [merged, *scatters], nodes, [merged.outputs[0], key, value], [result, *presents]
    )
