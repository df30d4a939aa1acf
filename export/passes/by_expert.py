"""The decoder for rows that all belong to one expert: what a CPU runs.

Rule: every expert operator becomes the nodes of that expert, as ``plugins_trt.function.one_expert`` states them; what
then leads to no output goes, with its weights and inputs. The text decoder has no visual expert's matrix, and no
routing is left. The visual decoder gives the caches and no logits, since no token is chosen after a visual one: the
head goes, and of the last layer all that comes after its keys and values.

Run in turns over the stretches of a prompt, on the same caches, both give what the one graph gives: in it, tokens of
different experts meet in the attention alone, which reads the past from the caches anyway.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from export.passes.nodes import inputs, remove_unused, replace
from plugins_trt import function
from plugins_trt.schema import ALL_OPERATORS, DOMAIN
from runtime.backends.graph import LOGITS


def keep_expert(decoder: ir.Model, expert: str) -> ir.Model:
    """Returns a decoder, with any form of the expert operators, for rows of ``text`` or ``visual`` tokens alone."""
    model = decoder.clone()
    graph, opset = model.graph, model.opset_imports[""]
    bodies = {operator.name: function.one_expert(operator, expert, opset) for operator in ALL_OPERATORS}
    for node in graph:
        if node.domain == DOMAIN:
            body = bodies[node.op_type]
            replace(node, body, inputs(node, len(body.input)))
    if expert == "visual":
        graph.outputs[:] = [output for output in graph.outputs if output.name != LOGITS]
    remove_unused(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    model.opset_imports.pop(DOMAIN, None)
    return model
