"""``Conv`` whose kernel is as large as its steps → one ``Gemm`` over patches.

Rule: with no padding such windows do not overlap, so that each is a row: [batch, channels, height, width] is cut into
[batch · rows · columns, channels · k · k], multiplied by the kernel, whose bytes are that matrix as they lie, and put
back as [batch, out, rows, columns]. ``Conv`` of opset 20 has no bfloat16, ``Gemm`` does.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.nodes import attributes, inputs, nodes_of, parse_body, replace, sizes
from runtime.errors import BundleError

_BODY = """
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


def unfold_patches(model: ir.Model) -> None:
    """Rewrites all of them, in place; values need shapes. A kernel's shape changes, its bytes do not.

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
        body = _BODY.format(width=channels * k * k, **counts)
        replace(node, parse_body("(x, kernel, bias) => (y)", body), [x, kernel, bias])
