"""Nodes of constants alone → the constant that they make.

Rule: ``Constant`` nodes and what follows from them only, never weights. The exporter writes ``Slice`` with axes that
are a ``Reshape`` of a constant, where older parsers take nothing but a constant.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx.reference import ReferenceEvaluator


def fold_constants(model: ir.Model) -> None:
    """Computes them, in place and in the order of the graph; the constants that they are made of stay."""
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
