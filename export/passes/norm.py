"""``RMSNormalization`` (opset 23) → its arithmetic.

Rule: the root of the mean square over the last axis, in float32; the quotient cast to the type of the input; then times
the weight. That is the order of the official code.
"""

from __future__ import annotations

import onnx

from export.passes.nodes import ValueInfo, attributes, parse_nodes

_BODY = """
    wide = Cast <to = 1> (x)
    squares = Mul (wide, wide)
    last = Constant <value = int64[1] {{-1}}> ()
    mean = ReduceMean <keepdims = 1> (squares, last)
    epsilon = Constant <value = float {{{epsilon!r}}}> ()
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    unit = Div (wide, root)
    narrow = Cast <to = {type}> (unit)
    y = Mul (narrow, weight)
"""


def decompose_norms(model: onnx.ModelProto, known: ValueInfo) -> None:
    """Takes all of them apart, in place."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "RMSNormalization" or node.domain:
            nodes.append(node)
            continue
        epsilon = attributes(node, ("epsilon",), axis=-1, stash_type=onnx.TensorProto.FLOAT)["epsilon"]
        x, weight = node.input
        body = _BODY.format(epsilon=epsilon, type=known.types[x])
        nodes += parse_nodes(body, node.name, x=x, weight=weight, y=node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
