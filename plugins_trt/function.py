"""The operators' bodies in standard ONNX operators, as model-local functions.

A model that carries these functions runs on any ONNX runtime without custom code. They are the specification of the
operators, their CPU implementation and what the kernel tests compare with.

All bodies route in the same way: find the indices of each expert's rows, gather those rows, apply the expert to them,
scatter the results back. An expert without rows multiplies matrices of zero rows, which costs nothing. ``Gemm`` with
``transB`` takes the weights as they are stored; ONNX Runtime would fold a ``Transpose`` in front of ``MatMul`` into a
second copy of every weight.

INT8 matrices are written as ``QuantizeLinear`` and ``DequantizeLinear``, with sums in float32. The kernels compute the
same, and round only where these bodies cast.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.parser

from plugins_trt import schema

OPSET = 24
"""Opset of the standard operators in the bodies and in the graphs of a bundle, unless they are made for older."""

CPU_DOMAIN = "com.microsoft"
"""Domain of ``MatMulNBits``, at version 1."""

ACCURACY_LEVEL = 4
"""Lets ``MatMulNBits`` turn each block of activations into INT8. With float32 activations one row takes 170 times as
long (2 cores with AVX-512 VNNI, one matrix [16384, 2048] in blocks of 128)."""

# All leading dimensions become one, and come back: Gemm takes two dimensions.
_FLATTEN = """
    minus_one = Constant <value = int64[1] {{-1}}> ()
    width = Shape <start = -1> (hidden_states)
    rows_shape = Concat <axis = 0> (minus_one, width)
    {rows} = Reshape (hidden_states, rows_shape)
"""
_UNFLATTEN = """
    leading = Shape <end = -1> (hidden_states)
    output_width = Shape <start = -1> ({results})
    output_shape = Concat <axis = 0> (leading, output_width)
    output = Reshape <allowzero = 1> ({rows}, output_shape)
"""

_GATHER = """
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
    results = Concat <axis = 0> ({results})
    order = Concat <axis = 0> (text_index, visual_index)
    output_rows = ScatterND (results, order, results)
"""

_SWIGLU = """
    {e}_gate, {e}_up = Split <axis = -1, num_outputs = 2> ({e}_projected)
    {e}_sigmoid = Sigmoid ({e}_gate)
    {e}_silu = Mul ({e}_gate, {e}_sigmoid)
    {e}_product = Mul ({e}_silu, {e}_up)
"""

# What an expert does to its rows: products, each as (rows, matrix, result), and the nodes between them.
_EXPERT: dict[str, tuple[tuple[str, str, str] | str, ...]] = {
    schema.FUSED_MOE.name: (("rows", "gate_up", "projected"), _SWIGLU, ("product", "down", "result")),
    schema.EXPERT_LINEAR.name: (("rows", "weight", "result"),),
}

_INT8_PRODUCT = """
    {e}_{w}_values = DequantizeLinear <axis = 0> ({e}_{w}, {e}_{w}_scale)
    {e}_{y} = Gemm <transB = 1> ({e}_{x}_values, {e}_{w}_values)
"""

# One such product, by the format of its matrix. That of an INT8 matrix is float32, and is rounded where it is used.
_PRODUCT = {
    schema.FLOAT: """
    {e}_{y} = Gemm <transB = 1> ({e}_{x}, {e}_{w})
""",
    schema.W8A16: """
    {e}_{x}_rounded = CastLike ({e}_{x}, hidden_states)
    {e}_{x}_values = Cast <to = 1> ({e}_{x}_rounded)
"""
    + _INT8_PRODUCT,
    schema.W8A8: """
    {e}_{x}_wide = Cast <to = 1> ({e}_{x})
    {e}_{x}_zero = Constant <value = int8 {{0}}> ()
    {e}_{x}_int8 = QuantizeLinear ({e}_{x}_wide, {e}_{w}_input_scale, {e}_{x}_zero)
    {e}_{x}_values = DequantizeLinear ({e}_{x}_int8, {e}_{w}_input_scale, {e}_{x}_zero)
"""
    + _INT8_PRODUCT,
    schema.NBITS: """
    {e}_{y} = com.microsoft.MatMulNBits <K: int = @{w}_columns, N: int = @{w}_rows, bits: int = @bits,
        block_size: int = @block_size, accuracy_level = {level}> ({e}_{x}, {e}_{w}, {e}_{w}_scale)
""",
}


def opset_of(model: onnx.ModelProto) -> int:
    """Returns the opset of a graph's standard operators."""
    version: int = next(entry.version for entry in model.opset_import if not entry.domain)
    return version


def _expert_body(expert: str, family: str, kind: str) -> tuple[str, str]:
    """The nodes of one expert, and the name of their result."""
    steps = "".join(
        step.format(e=expert)
        if isinstance(step, str)
        else _PRODUCT[kind].format(e=expert, x=step[0], w=step[1], y=step[2], level=ACCURACY_LEVEL)
        for step in _EXPERT[family]
    )
    if kind in (schema.W8A16, schema.W8A8):
        return f"{steps} {expert}_rounded = CastLike ({expert}_result, hidden_states)", f"{expert}_rounded"
    return steps, f"{expert}_result"


def body(operator: schema.Operator, opset: int = OPSET) -> onnx.FunctionProto:
    """Returns the function body of an operator, for every type that T may be.

    Args:
        operator: any of ``plugins_trt.schema``.
        opset: the opset of the graph that it goes into; the bodies are the same from 20 on.
    """
    experts, results = zip(
        *(_expert_body(expert, operator.family, operator.format_of(expert)) for expert in schema.EXPERTS), strict=True
    )
    before = _FLATTEN.format(rows="rows") + _GATHER
    after = _SCATTER.format(results=", ".join(results)) + _UNFLATTEN.format(results="results", rows="output_rows")
    return _function(operator, before + "".join(experts) + after, opset)


def _function(operator: schema.Operator, nodes: str, opset: int) -> onnx.FunctionProto:
    domains = {"": opset} if operator.has_plugin else {"": opset, CPU_DOMAIN: 1}
    imports = ", ".join(f'"{domain}" : {version}' for domain, version in domains.items())
    return onnx.parser.parse_function(
        f"""<opset_import: [{imports}], domain: "{schema.DOMAIN}">
        {operator.name} <{", ".join((*operator.attributes, *operator.size_attributes))}>
        ({", ".join(tensor.name for tensor in operator.inputs)})
        => ({", ".join(tensor.name for tensor in operator.outputs)})
        {{{nodes}}}"""
    )


def bodies(names: Iterable[str], opset: int = OPSET) -> list[onnx.FunctionProto]:
    """Returns the function bodies of the named operators, in the order of the schema; leaves out other names."""
    wanted = set(names)
    return [body(operator, opset) for operator in schema.ALL_OPERATORS if operator.name in wanted]


def one_expert(operator: schema.Operator, expert: str, opset: int = OPSET) -> onnx.FunctionProto:
    """Returns the body for a graph where all rows belong to one expert: its matrices alone, and no routing.

    Args:
        operator: any of ``plugins_trt.schema``.
        expert: ``text`` or ``visual``.
        opset: as for ``body``.
    """
    kind = operator.format_of(expert)
    steps, result = _expert_body(expert, operator.family, kind)
    if kind == schema.NBITS:  # MatMulNBits takes all dimensions.
        before, after = f"{expert}_rows = Identity (hidden_states)", f"output = Identity ({result})"
    else:
        before, after = _FLATTEN.format(rows=f"{expert}_rows"), _UNFLATTEN.format(results=result, rows=result)
    return _function(operator, before + steps + after, opset)
