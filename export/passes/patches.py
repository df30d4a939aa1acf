"""``Conv`` whose kernel is as large as its steps → one ``Gemm`` over patches.

Rule: with no padding such windows do not overlap, so that each is a row: [batch, channels, height, width] is cut into
[batch · rows · columns, channels · k · k], multiplied by the kernel, whose bytes are that matrix as they lie, and put
back as [batch, out, rows, columns]. ``Conv`` of opset 20 has no bfloat16, ``Gemm`` does.
"""

from __future__ import annotations

import onnx

from export.passes.nodes import ValueInfo, attributes, parse_nodes
from runtime.errors import BundleError

_GIVEN = ("strides", "pads", "dilations", "kernel_shape")

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


def unfold_patches(model: onnx.ModelProto, known: ValueInfo) -> None:
    """Rewrites all of them, in place; the shape of a kernel changes in the graph, its bytes do not.

    Raises:
        BundleError: a convolution of another form.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Conv" or node.domain:
            nodes.append(node)
            continue
        x, kernel, bias = node.input
        out, channels, k, other = known.sizes(kernel, 0, 1, 2, 3)
        height, width = known.sizes(x, 2, 3)
        given = attributes(node, _GIVEN, group=1, auto_pad="NOTSET")
        expected = {"strides": [k, k], "pads": [0] * 4, "dilations": [1, 1], "kernel_shape": [k, k]}
        if k != other or height % k or width % k or not given.items() <= expected.items() or kernel not in initializers:
            raise BundleError(f"Conv {node.name} is not a cut into patches: export the bundle again")
        sizes = {"channels": channels, "out": out, "k": k, "rows": height // k, "columns": width // k}
        body = _BODY.format(width=channels * k * k, **sizes)
        initializers[kernel].dims[:] = [out, channels * k * k]
        nodes += parse_nodes(body, node.name, x=x, kernel=kernel, bias=bias, y=node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
