"""``RotaryEmbedding`` (opset 23) → its arithmetic.

Rule: rows of both tables gathered by position, once for all nodes that take the same; then the halves left and right of
a head become left · cos − right · sin and right · cos + left · sin.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.nodes import attributes, inputs, insert_before, nodes_of, parse_body, replace

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


def decompose_rotary(model: ir.Model) -> None:
    """Takes all of them apart, in place. The rows are gathered before the first node that takes them."""
    rows: dict[tuple[ir.Value, ...], list[ir.Value]] = {}
    for node in nodes_of(model, "RotaryEmbedding"):
        attributes(node, [], interleaved=0, num_heads=0, rotary_embedding_dim=0)
        x, *source = inputs(node, 4)
        key = tuple(source)
        if key not in rows:
            rows[key] = insert_before(node, parse_body("(cos, sin, positions) => (c, s)", _ROWS), source, node.name)
        replace(node, parse_body("(x, c, s) => (y)", _BODY), [x, *rows[key]])
