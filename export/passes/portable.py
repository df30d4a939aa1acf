"""Graphs in operators of opset 20: for TensorRT 10.3, which is what JetPack 6 has, and older ONNX Runtimes.

A bundle's graphs use operators of opset 23 and 24, each of which newer runtimes have one fused kernel for. Here they
are taken apart, one pass a file; weights stay as they are. The decoder's inputs stay too, but in place of the caches it
gives what is new in them (``export.passes.attention``).
"""

from __future__ import annotations

import onnx

from export.passes.attention import split_caches
from export.passes.constants import fold_constants
from export.passes.nodes import OPSET, ValueInfo
from export.passes.norm import decompose_norms
from export.passes.patches import unfold_patches
from export.passes.rotary import decompose_rotary
from plugins_trt.function import opset_of
from runtime.errors import BundleError

IR_VERSION = 9
"""Of ONNX's files, as long as opset 20 is the newest."""


def portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in opset 20, as a new model; one that is in it already is returned as it is.

    Function bodies of the custom operators are kept, in that opset too.

    Raises:
        BundleError: a node that opset 20 has no operator for.
    """
    if opset_of(model) <= OPSET:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    known = ValueInfo.of(made)
    split_caches(made, known)
    decompose_rotary(made)
    decompose_norms(made, known)
    unfold_patches(made, known)
    fold_constants(made)
    del made.graph.value_info[:]
    made.ir_version = IR_VERSION
    for part in (made, *made.functions):
        for entry in part.opset_import:
            if not entry.domain:
                entry.version = OPSET
    for node in (*made.graph.node, *(node for body in made.functions for node in body.node)):
        if not node.domain:
            _require(node)
    return made


def _require(node: onnx.NodeProto) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        raise BundleError(f"{node.op_type} {node.name} has no form in opset {OPSET}: export the bundle again") from None
    newer = [attribute.name for attribute in node.attribute if attribute.name not in schema.attributes]
    if newer:
        raise BundleError(
            f"{node.op_type} {node.name}: opset {OPSET} does not have {newer[0]}: export the bundle again"
        )
