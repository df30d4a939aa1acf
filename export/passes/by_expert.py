"""The decoder for rows that all belong to one expert: what a CPU runs.

Rule: every expert operator becomes the nodes of that expert, as ``plugins_trt.function.one_expert`` states them; what
then leads to no output goes, with its weights and inputs. The text decoder has no visual expert's matrix, and no
routing is left. The visual decoder gives the caches and no logits, since no token is chosen after a visual one: the
head goes, and of the last layer all that comes after its keys and values.

Run in turns over the stretches of a prompt, on the same caches, both give what the one graph gives: in it, tokens of
different experts meet in the attention alone, which reads the past from the caches anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from plugins_trt import function
from plugins_trt.schema import ALL_OPERATORS, DOMAIN
from runtime.backends.graph import LOGITS


def for_expert(model: onnx.ModelProto, expert: str) -> onnx.ModelProto:
    """A copy of a decoder without weights, for rows of ``text`` or ``visual`` tokens alone."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    opset = function.opset_of(copy)
    bodies = {operator.name: function.one_expert(operator, expert, opset) for operator in ALL_OPERATORS}
    nodes = [
        new
        for node in copy.graph.node
        for new in (_written_out(node, bodies[node.op_type]) if node.domain == DOMAIN else [node])
    ]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    for field in (copy.functions, copy.opset_import):
        others = [entry for entry in field if entry.domain != DOMAIN]
        del field[:]
        field.extend(others)
    if expert == "visual":
        outputs = [output for output in copy.graph.output if output.name != LOGITS]
        del copy.graph.output[:]
        copy.graph.output.extend(outputs)
    prune(copy.graph)
    return copy


def _written_out(node: onnx.NodeProto, body: onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a body in place of a node, named after it."""
    names = dict(zip(body.input, node.input, strict=True)) | dict(zip(body.output, node.output, strict=True))
    given = {attribute.name: attribute for attribute in node.attribute}
    for inner in body.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        copy.name = f"{node.name}.{inner.output[0]}"
        for values in (copy.input, copy.output):
            values[:] = [names.get(value, f"{node.name}.{value}") for value in values]
        for attribute in copy.attribute:
            if attribute.ref_attr_name:
                name = attribute.name
                attribute.CopyFrom(given[attribute.ref_attr_name])
                attribute.name = name
        yield copy


def prune(graph: onnx.GraphProto) -> None:
    """Takes out what leads to no output: nodes, initializers, and inputs other than caches."""
    wanted = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    made = {name for node in nodes for name in node.output}
    for field, values in (
        (graph.node, nodes[::-1]),
        (graph.initializer, [tensor for tensor in graph.initializer if tensor.name in wanted]),
        (graph.input, [value for value in graph.input if value.name in wanted]),
        (graph.value_info, [value for value in graph.value_info if value.name in made]),
    ):
        del field[:]
        field.extend(values)
