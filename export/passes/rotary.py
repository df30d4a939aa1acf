"""``RotaryEmbedding`` (opset 23) → its arithmetic.

Rule: rows of both tables gathered by position, once for all nodes that take the same; then the halves left and right of
a head become left · cos − right · sin and right · cos + left · sin.
"""

from __future__ import annotations

import onnx

from export.passes.nodes import attributes, parse_nodes

_ROWS = """
    cos_rows = Gather <axis = 0> (cos, positions)
    sin_rows = Gather <axis = 0> (sin, positions)
    heads = Constant <value = int64[1] {1}> ()
    c = Unsqueeze (cos_rows, heads)
    s = Unsqueeze (sin_rows, heads)
"""

_BODY = """
    left, right = Split <axis = -1, num_outputs = 2> (x)
    left_cos = Mul (left, c)
    right_sin = Mul (right, s)
    turned_left = Sub (left_cos, right_sin)
    right_cos = Mul (right, c)
    left_sin = Mul (left, s)
    turned_right = Add (right_cos, left_sin)
    y = Concat <axis = -1> (turned_left, turned_right)
"""


def decompose_rotary(model: onnx.ModelProto) -> None:
    """Takes all of them apart, in place."""
    nodes: list[onnx.NodeProto] = []
    rows: dict[tuple[str, ...], str] = {}
    for node in model.graph.node:
        if node.op_type != "RotaryEmbedding" or node.domain:
            nodes.append(node)
            continue
        attributes(node, (), interleaved=0, num_heads=0, rotary_embedding_dim=0)
        x, cos, sin, positions = node.input
        if (cos, sin, positions) not in rows:
            rows[cos, sin, positions] = node.name
            nodes += parse_nodes(_ROWS, node.name, cos=cos, sin=sin, positions=positions)
        first = rows[cos, sin, positions]
        nodes += parse_nodes(_BODY, node.name, x=x, c=f"{first}.c", s=f"{first}.s", y=node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
