"""``TensorScatter`` and ``Attention`` (opset 24) → attention over two parts, and no cache that is written.

Rule: where ``Attention`` takes keys and values that ``TensorScatter`` just wrote into the caches, it is computed from
the caches as they were and from the chunk's own keys and values. The scores of both parts stand side by side for one
softmax in float32. The mask is shut where the caches will hold the chunk, and computed anew for the chunk's keys in
those places. So the result is that of the two nodes, for any mask ``key position <= query position``.

The outputs ``present.*``, whole caches, become ``update.*``, the chunk's keys and values (``runtime.backends.graph``).
Operators of opset 20 could write a cache only into a second one, which takes twice the memory and copies all of it for
every token: TensorRT does not promise them an output at the address of an input.

Heads are grouped by a reshape of the query, so that no key or value is repeated.
"""

from __future__ import annotations

import onnx

from export.passes.nodes import ValueInfo, attributes, parse_nodes
from runtime.backends.graph import PRESENT, UPDATE
from runtime.errors import BundleError

_LOWEST = -3.4028234663852886e38
"""Of float32. Nothing lower is needed: a query sees its own key at least."""

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
    lowest = Constant <value = float {{{lowest!r}}}> ()
    open = Where (seen, scores, lowest)
    weights = Softmax <axis = -1> (open)
    narrow = Cast <to = {type}> (weights)
    by_group = Constant <value = int64[4] {{0, {kv_heads}, -1, 0}}> ()
    shares = Reshape (narrow, by_group)
    zero = Constant <value = int64[1] {{0}}> ()
    end = Constant <value = int64[1] {{{end}}}> ()
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


def split_caches(model: onnx.ModelProto, known: ValueInfo) -> None:
    """Rewrites every pair of cache and attention, in place.

    Raises:
        BundleError: a cache that is used otherwise, or a mask of another form.
    """
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    scatters = {node.output[0]: node for node in graph.node if node.op_type == "TensorScatter"}
    nodes: list[onnx.NodeProto] = []
    seen: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "TensorScatter":
            attributes(node, (), axis=2, mode="linear")
            continue
        if node.op_type != "Attention":
            if any(name in scatters for name in node.input):
                raise _strange(node)
            nodes.append(node)
            continue
        query, key, value, mask = node.input
        compared = made_by.get(mask)
        if key not in scatters or value not in scatters or compared is None or compared.op_type != "LessOrEqual":
            raise _strange(node)
        past_key, new_key, write_indices = scatters[key].input
        past_value, new_value, other = scatters[value].input
        if other != write_indices:
            raise _strange(node)
        if mask not in seen:
            seen[mask] = f"{mask}.seen"
            keys, queries = compared.input
            nodes += parse_nodes(
                _SEEN, mask, mask=mask, keys=keys, queries=queries, write_indices=write_indices, new_key=new_key
            )
        heads, head_dim = known.sizes(query, 1, 3)
        (kv_heads,) = known.sizes(past_key, 1)
        body = _BODY.format(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=attributes(node, ("scale",))["scale"],
            type=known.types[query],
            lowest=_LOWEST,
            end=(1 << 63) - 1,
        )
        nodes += parse_nodes(
            body,
            node.name,
            query=query,
            seen=seen[mask],
            past_key=past_key,
            past_value=past_value,
            new_key=new_key,
            new_value=new_value,
            y=node.output[0],
        )
    del graph.node[:]
    graph.node.extend(nodes)
    _give_updates(graph, {name: node.input[1] for name, node in scatters.items()}, known)


def _give_updates(graph: onnx.GraphProto, updates: dict[str, str], known: ValueInfo) -> None:
    """Makes outputs of what was written into the caches, in place of the caches."""
    renamed = {}
    for output in graph.output:
        if output.name in updates:
            name = UPDATE + output.name.removeprefix(PRESENT)
            update = updates[output.name]
            renamed[update] = name
            shape = known.shapes[update]
            output.CopyFrom(onnx.helper.make_tensor_value_info(name, known.types[update], shape))
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]


def _strange(node: onnx.NodeProto) -> BundleError:
    return BundleError(
        f"{node.op_type} {node.name} is not attention over caches as this monoedge exports it: export the bundle again"
    )
