"""Graphs in operators of opset 20: for TensorRT 10.3, which is what JetPack 6 has, and older ONNX Runtimes.

A bundle's graphs use operators of opset 23 and 24, each of which newer runtimes have one fused kernel for. Here they
are taken apart; weights stay as they are. The decoder's inputs stay too, but in place of the caches it gives what is
new in them (``export.passes.attention``).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.passes.attention import split_caches
from export.passes.decompose import decompose_norms, decompose_rotary, fold_constants, unfold_patches
from export.passes.nodes import OPSET, infer_types
from plugins_trt.function import opset_of
from runtime.errors import BundleError

IR_VERSION = 9
"""Of ONNX's files, as long as opset 20 is the newest."""


def portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the same graph in opset 20, as a new model; one that is in it already is returned as it is.

    Function bodies of the custom operators are kept, in that opset too.

    Raises:
        BundleError: a node that opset 20 has no operator for.
    """
    if opset_of(model) <= OPSET:
        return model
    made = infer_types(model)
    for rewrite in (split_caches, decompose_rotary, decompose_norms, unfold_patches, fold_constants):
        rewrite(made)
    RemoveUnusedNodesPass()(made)
    for graph in (made.graph, *(body.graph for body in made.functions.values())):
        graph.opset_imports[""] = OPSET
        for node in graph:
            if not node.domain:
                _require(node)
    made.ir_version = IR_VERSION
    result = ir.to_proto(made)
    del result.graph.value_info[:]
    return result


def _require(node: ir.Node) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        raise BundleError(f"{node.op_type} {node.name} has no form in opset {OPSET}: export the bundle again") from None
    if new := [name for name in node.attributes if name not in schema.attributes]:
        raise BundleError(f"{node.op_type} {node.name}: opset {OPSET} does not have {new[0]}: export the bundle again")
