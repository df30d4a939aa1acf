"""``RMSNormalization`` (opset 23) → its arithmetic.

Rule: the root of the mean square over the last axis, in float32; the quotient cast to the type of the input; then times
the weight. That is the order of the official code.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.nodes import attributes, inputs, parse_body, replace

_SIGNATURE = "(x, weight) => (y)"

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


class DecomposeNorms(ir.passes.InPlacePass):
    """Takes all of them apart."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Needs the types of values."""
        nodes = [node for node in model.graph if node.op_type == "RMSNormalization" and not node.domain]
        for node in nodes:
            epsilon = attributes(node, ["epsilon"], axis=-1, stash_type=ir.DataType.FLOAT)["epsilon"]
            x, weight = inputs(node, 2)
            replace(node, parse_body(_SIGNATURE, _BODY.format(epsilon=epsilon, type=x.dtype)), [x, weight])
        return ir.passes.PassResult(model, bool(nodes))
