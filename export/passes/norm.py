"""``RMSNormalization`` (opset 23) → its arithmetic.

Rule: the root of the mean square over the last axis, in float32; the quotient cast to the type of the input; then times
the weight. That is the order of the official code.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.nodes import attributes, inputs, nodes_of, parse_body, replace

_BODY = """
    wide = Cast <to = 1> (x)
    squares = Mul (wide, wide)
    last = Constant <value = int64[1] {{-1}}> ()
    mean = ReduceMean <keepdims = 1> (squares, last)
    epsilon = Constant <value = float {{{epsilon!r}}}> ()
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    unit = Div (wide, root)
    narrow = Cast <to = {type:d}> (unit)
    y = Mul (narrow, weight)
"""


def decompose_norms(model: ir.Model) -> None:
    """Takes all of them apart, in place; values need types."""
    for node in nodes_of(model, "RMSNormalization"):
        epsilon = attributes(node, ["epsilon"], axis=-1, stash_type=ir.DataType.FLOAT)["epsilon"]
        x, weight = inputs(node, 2)
        body = parse_body("(x, weight) => (y)", _BODY.format(epsilon=epsilon, type=x.dtype))
        replace(node, body, [x, weight])
