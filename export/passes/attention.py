"""``TensorScatter`` and ``Attention`` (opset 24) → attention over two parts, and no cache that is written.

Rule: where ``Attention`` takes keys and values that ``TensorScatter`` just wrote into the caches, it is computed from
the caches as they were and from the chunk's own keys and values. The scores of both parts stand side by side for one
softmax in float32. The mask is shut where the caches will hold the chunk, and computed anew for the chunk's keys in
those places. So the result is that of the two nodes, for any mask ``key position <= query position``. Where it is shut,
a score is the lowest float32, which is low enough: a query sees its own key at least.

The outputs ``present.*``, whole caches, become ``update.*``, the chunk's keys and values (``runtime.backends.graph``).
Operators of opset 20 could write a cache only into a second one, which takes twice the memory and copies all of it for
every token: TensorRT does not promise them an output at the address of an input.

Heads are grouped by a reshape of the query, so that no key or value is repeated.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.nodes import attributes, inputs, insert_before, nodes_of, parse, producer, replace, sizes, strange
from runtime.backends.graph import PRESENT, UPDATE

_SEEN = """
    heads = Constant <value = int64[4] {-1, 1, 1, 1}> ()
    first = Reshape (write_indices, heads)
    length = Shape <start = 2, end = 3> (new_key)
    stop = Add (first, length)
    before = Less (keys, first)
    behind = GreaterOrEqual (keys, stop)
    kept = Or (before, behind)
    past_seen = And (mask, kept)
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    axis = Constant <value = int64[1] {0}> ()
    count = Squeeze (length, axis)
    steps = Range (zero, count, one)
    places = Add (first, steps)
    new_seen = LessOrEqual (places, queries)
    seen = Concat <axis = -1> (past_seen, new_seen)
"""

_BODY = """
    groups = Constant <value = int64[4] {{0, {kv_heads}, -1, {head_dim}}}> ()
    rows = Reshape (query, groups)
    past_columns = Transpose <perm = [0, 1, 3, 2]> (past_key)
    past_products = MatMul (rows, past_columns)
    new_columns = Transpose <perm = [0, 1, 3, 2]> (new_key)
    new_products = MatMul (rows, new_columns)
    products = Concat <axis = -1> (past_products, new_products)
    wide = Cast <to = 1> (products)
    scale = Constant <value = float {{{scale!r}}}> ()
    scaled = Mul (wide, scale)
    by_head = Constant <value = int64[4] {{0, {heads}, -1, 0}}> ()
    scores = Reshape (scaled, by_head)
    lowest = Constant <value = float {{-3.4028234663852886e38}}> ()
    open = Where (seen, scores, lowest)
    weights = Softmax <axis = -1> (open)
    narrow = Cast <to = {type:d}> (weights)
    by_group = Constant <value = int64[4] {{0, {kv_heads}, -1, 0}}> ()
    shares = Reshape (narrow, by_group)
    zero = Constant <value = int64[1] {{0}}> ()
    end = Constant <value = int64[1] {{9223372036854775807}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    capacity = Shape <start = 2, end = 3> (past_key)
    past_shares = Slice (shares, zero, capacity, last)
    new_shares = Slice (shares, capacity, end, last)
    past_part = MatMul (past_shares, past_value)
    new_part = MatMul (new_shares, new_value)
    both = Add (past_part, new_part)
    shape = Constant <value = int64[4] {{0, {heads}, -1, {head_dim}}}> ()
    y = Reshape (both, shape)
"""


def split_caches(model: ir.Model) -> None:
    """Rewrites every pair of cache and attention, in place; values need types and shapes.

    Raises:
        BundleError: a cache is used otherwise, or a mask has another form.
    """
    outputs, scatters = model.graph.outputs, nodes_of(model, "TensorScatter")
    for scatter in scatters:
        attributes(scatter, [], axis=2, mode="linear")
    seen: dict[ir.Value, ir.Value] = {}
    for node in nodes_of(model, "Attention"):
        _split(node, seen)
    for scatter in scatters:
        (present,), (_, update, _) = scatter.outputs, inputs(scatter, 3)
        if present.uses():
            raise strange(present.consumers()[0])
        if present.is_graph_output():
            update.name = UPDATE + str(present.name).removeprefix(PRESENT)
            outputs[outputs.index(present)] = update


def _split(node: ir.Node, seen: dict[ir.Value, ir.Value]) -> None:
    """Rewrites one; ``seen`` has the new mask of each mask, for all layers."""
    query, key, value, mask = inputs(node, 4)
    keys, queries = inputs(producer(mask, "LessOrEqual", node), 2)
    past_key, new_key, write_indices = inputs(producer(key, "TensorScatter", node), 3)
    past_value, new_value, other = inputs(producer(value, "TensorScatter", node), 3)
    if other is not write_indices:
        raise strange(node)
    if mask not in seen:
        body = parse("(mask, keys, queries, write_indices, new_key) => (seen)", _SEEN)
        (seen[mask],) = insert_before(node, body, [mask, keys, queries, write_indices, new_key], str(mask.name))
    heads, head_dim = sizes(query, 1, 3)
    counts = {"heads": heads, "kv_heads": sizes(past_key, 1)[0], "head_dim": head_dim}
    text = _BODY.format(**counts, **attributes(node, ["scale"]), type=query.dtype)
    body = parse("(query, seen, past_key, past_value, new_key, new_value) => (y)", text)
    replace(node, body, [query, seen[mask], past_key, past_value, new_key, new_value])
