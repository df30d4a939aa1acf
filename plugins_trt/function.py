"""The operators' bodies in standard ONNX operators, as model-local functions.

A model that carries these functions runs on any ONNX runtime with no custom code. They are the specification of
the operators, their CPU implementation and the oracle of the kernel tests at once.

Both bodies route the same way: the indices of each expert's rows, those rows gathered, the expert applied to them,
and the results scattered back. An expert without rows multiplies matrices of zero rows, which costs nothing.
``Gemm`` with ``transB`` takes the weights as they lie; a ``Transpose`` in front of ``MatMul`` would be folded into
a second copy of every weight by ONNX Runtime.
"""

from __future__ import annotations

import onnx
import onnx.parser

from plugins_trt.schema import DOMAIN, EXPERT_LINEAR, FUSED_MOE, OPERATORS, Operator

OPSET = 24
"""Opset of the standard operators in the bodies and in every graph of a bundle."""

_GATHER = """
    minus_one = Constant <value_ints = [-1]> ()
    width = Shape <start = -1> (hidden_states)
    rows_shape = Concat <axis = 0> (minus_one, width)
    rows = Reshape (hidden_states, rows_shape)
    is_visual = Reshape (visual_mask, minus_one)
    is_text = Not (is_visual)
    text_index_t = NonZero (is_text)
    text_index = Transpose (text_index_t)
    text_rows = GatherND (rows, text_index)
    visual_index_t = NonZero (is_visual)
    visual_index = Transpose (visual_index_t)
    visual_rows = GatherND (rows, visual_index)
"""

# `order` is a permutation of all rows, so every row of the scattered data is overwritten.
_SCATTER = """
    results = Concat <axis = 0> (text_result, visual_result)
    order = Concat <axis = 0> (text_index, visual_index)
    output_rows = ScatterND (results, order, results)
    leading = Shape <end = -1> (hidden_states)
    output_width = Shape <start = -1> (results)
    output_shape = Concat <axis = 0> (leading, output_width)
    output = Reshape <allowzero = 1> (output_rows, output_shape)
"""

_SWIGLU_EXPERT = """
    {e}_projected = Gemm <transB = 1> ({e}_rows, {e}_gate_up)
    {e}_gate, {e}_up = Split <axis = -1, num_outputs = 2> ({e}_projected)
    {e}_sigmoid = Sigmoid ({e}_gate)
    {e}_silu = Mul ({e}_gate, {e}_sigmoid)
    {e}_product = Mul ({e}_silu, {e}_up)
    {e}_result = Gemm <transB = 1> ({e}_product, {e}_down)
"""

_LINEAR_EXPERT = """
    {e}_result = Gemm <transB = 1> ({e}_rows, {e}_weight)
"""

_EXPERT_BODY = {FUSED_MOE.name: _SWIGLU_EXPERT, EXPERT_LINEAR.name: _LINEAR_EXPERT}


def body(operator: Operator) -> onnx.FunctionProto:
    """The function body of an operator, in opset ``OPSET``, for every type that T may be."""
    experts = "".join(_EXPERT_BODY[operator.name].format(e=expert) for expert in ("text", "visual"))
    return onnx.parser.parse_function(
        f"""<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
        {operator.name} <{", ".join(operator.attributes)}>
        ({", ".join(tensor.name for tensor in operator.inputs)})
        => ({", ".join(tensor.name for tensor in operator.outputs)})
        {{{_GATHER}{experts}{_SCATTER}}}"""
    )


def bodies() -> list[onnx.FunctionProto]:
    """The function bodies of all operators of the domain."""
    return [body(operator) for operator in OPERATORS]
