"""Newer operators → their arithmetic in opset 20, and constants that older parsers want to find computed."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from export.passes.nodes import attributes, inputs, insert_before, nodes_of, parse, replace, sizes
from runtime.errors import BundleError

_NORM = """
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

_ROTARY_ROWS = """
    cos_rows = Gather <axis = 0> (cos, positions)
    sin_rows = Gather <axis = 0> (sin, positions)
    heads = Constant <value = int64[1] {1}> ()
    c = Unsqueeze (cos_rows, heads)
    s = Unsqueeze (sin_rows, heads)
"""

_ROTARY = """
    left, right = Split <axis = -1, num_outputs = 2> (x)
    left_cos = Mul (left, c)
    right_sin = Mul (right, s)
    turned_left = Sub (left_cos, right_sin)
    right_cos = Mul (right, c)
    left_sin = Mul (left, s)
    turned_right = Add (right_cos, left_sin)
    y = Concat <axis = -1> (turned_left, turned_right)
"""

_PATCHES = """
    cut = Constant <value = int64[6] {{-1, {channels}, {rows}, {k}, {columns}, {k}}}> ()
    windows = Reshape (x, cut)
    patches = Transpose <perm = [0, 2, 4, 1, 3, 5]> (windows)
    flat = Constant <value = int64[2] {{-1, {width}}}> ()
    matrix = Reshape (patches, flat)
    product = Gemm <transB = 1> (matrix, kernel, bias)
    places = Constant <value = int64[4] {{-1, {rows}, {columns}, {out}}}> ()
    image = Reshape (product, places)
    y = Transpose <perm = [0, 3, 1, 2]> (image)
"""


def decompose_norms(model: ir.Model) -> None:
    """Takes every ``RMSNormalization`` (opset 23) apart, in place; values need types.

    The mean square and the quotient are float32; the quotient is cast to the type of the input, then times the weight.
    That is the order of the official code.
    """
    for node in nodes_of(model, "RMSNormalization"):
        epsilon = attributes(node, ["epsilon"], axis=-1, stash_type=ir.DataType.FLOAT)["epsilon"]
        x, weight = inputs(node, 2)
        body = parse("(x, weight) => (y)", _NORM.format(epsilon=epsilon, type=x.dtype))
        replace(node, body, [x, weight])


def decompose_rotary(model: ir.Model) -> None:
    """Takes every ``RotaryEmbedding`` (opset 23) apart, in place.

    Rows of both tables are gathered by position, once for all nodes that take the same, before the first of them. The
    halves of a head become left · cos − right · sin and right · cos + left · sin.
    """
    rows: dict[tuple[ir.Value, ...], list[ir.Value]] = {}
    for node in nodes_of(model, "RotaryEmbedding"):
        attributes(node, [], interleaved=0, num_heads=0, rotary_embedding_dim=0)
        x, *source = inputs(node, 4)
        key = tuple(source)
        if key not in rows:
            body = parse("(cos, sin, positions) => (c, s)", _ROTARY_ROWS)
            rows[key] = insert_before(node, body, source, node.name)
        replace(node, parse("(x, c, s) => (y)", _ROTARY), [x, *rows[key]])


def unfold_patches(model: ir.Model) -> None:
    """Makes every ``Conv`` whose kernel is as large as its steps one ``Gemm`` over patches, in place.

    With no padding such windows do not overlap: [batch, channels, height, width] is cut into rows, [batch · rows ·
    columns, channels · k · k], and multiplied by the kernel, whose bytes are that matrix as they lie; only its shape
    changes. ``Conv`` of opset 20 has no bfloat16, ``Gemm`` does. Values need shapes.

    Raises:
        BundleError: a convolution has another form.
    """
    for node in nodes_of(model, "Conv"):
        x, kernel, bias = inputs(node, 3)
        out, channels, k, other = sizes(kernel, 0, 1, 2, 3)
        height, width = sizes(x, 2, 3)
        expected = {"strides": (k, k), "pads": (0,) * 4, "dilations": (1, 1), "kernel_shape": (k, k)}
        given = attributes(node, [*expected], group=1, auto_pad="NOTSET")
        fits = k == other and height % k == width % k == 0 and given.items() <= expected.items()
        if not fits or kernel.const_value is None:
            raise BundleError(f"Conv {node.name} is not a cut into patches: export the bundle again")
        matrix = ir.to_proto(kernel.const_value)
        matrix.dims[:] = [out, channels * k * k]
        kernel.const_value, kernel.shape = ir.serde.deserialize_tensor(matrix), ir.Shape(matrix.dims)
        counts = {"channels": channels, "out": out, "k": k, "rows": height // k, "columns": width // k}
        body = _PATCHES.format(width=channels * k * k, **counts)
        replace(node, parse("(x, kernel, bias) => (y)", body), [x, kernel, bias])


def fold_constants(model: ir.Model) -> None:
    """Computes what follows from ``Constant`` nodes alone, never from weights, in place and in the order of the graph.

    The exporter writes ``Slice`` with axes that are a ``Reshape`` of a constant, where older parsers take nothing but
    a constant. The constants that were computed with stay.
    """
    for node in model.graph:
        sources = [value.producer() for value in node.inputs if value is not None]
        constants = [source for source in sources if source is not None and source.op_type == "Constant"]
        if node.domain or not constants or len(constants) < len(node.inputs) or len(node.outputs) > 1:
            continue
        given = {str(constant.outputs[0].name): _compute(constant, {}) for constant in constants}
        value = ir.tensor(_compute(node, given), name=node.outputs[0].name)
        made = ir.node("Constant", [], {"value": value}, name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [made], node.outputs, made.outputs)


def _compute(node: ir.Node, given: dict[str, Any]) -> Any:  # noqa: ANN401 - an array
    (result,) = ReferenceEvaluator(ir.to_proto(node)).run(None, given)
    return result
