"""What passes share: graphs read, what is known of nodes and values, and ONNX text in place of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from runtime.bundle.reader import Bundle
from runtime.errors import BundleError

OPSET = 20
"""Opset of portable graphs: TensorRT 10.3 reads up to it, ONNX Runtime from 1.17 on."""


def load_graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    """Reads a graph of a bundle, without weights.

    Raises:
        BundleError: it cannot be read.
    """
    path = bundle.path(name)
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        # Protobuf has errors of its own, which differ between its versions.
        raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from None


def infer_types(model: onnx.ModelProto) -> ir.Model:
    """Returns a model whose values have the types and shapes that strict shape inference finds; no weights are read.

    Raises:
        BundleError: the graph contradicts itself.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f'the graph "{model.graph.name}" does not pass shape inference: {reason}') from None
    return ir.from_proto(inferred)


def nodes_of(model: ir.Model, op_type: str) -> list[ir.Node]:
    """Returns a graph's nodes of one of ONNX's own operators, in order."""
    return [node for node in model.graph if node.op_type == op_type and not node.domain]


def sizes(value: ir.Value, *axes: int) -> list[int]:
    """Returns some of a value's dimensions, which have to be numbers.

    Raises:
        BundleError: one is not.
    """
    shape = value.shape or ()
    numbers = [size for axis in axes if axis < len(shape) and isinstance(size := shape[axis], int)]
    if len(numbers) != len(axes):
        raise BundleError(f'"{value.name}" has no fixed sizes in the dimensions {axes}: export the bundle again')
    return numbers


def inputs(node: ir.Node, count: int) -> list[ir.Value]:
    """Returns the inputs of a node, which have to be that many.

    Raises:
        BundleError: they are not.
    """
    values = [value for value in node.inputs if value is not None]
    if not len(values) == len(node.inputs) == count:
        raise BundleError(f"{node.op_type} {node.name} should have {count} inputs: export the bundle again")
    return values


def producer(value: ir.Value | None, op_type: str, attention: ir.Node) -> ir.Node:
    """Returns the node that makes a value, which leads to an attention.

    Raises:
        BundleError: it is not of that type, so that the attention is not one that monoedge exports.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise strange(attention)
    return node


def strange(node: ir.Node) -> BundleError:
    """Returns the error of an attention, or of its cache, that has another form than those that monoedge exports."""
    return BundleError(
        f"{node.op_type} {node.name} is not attention over caches as this monoedge exports it: export the bundle again"
    )


def attributes(node: ir.Node, wanted: Sequence[str], **fixed: int | str) -> dict[str, Any]:
    """Returns the attributes of these names that a node has.

    Raises:
        BundleError: it has another one, or one that is ``fixed`` with another value: a pass would lose it.
    """
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    for name, value in given.items():
        if name not in wanted and (name not in fixed or value != fixed[name]):
            raise BundleError(f"{node.op_type} {node.name} has {name} = {value}, unknown here: export the bundle again")
    return {name: value for name, value in given.items() if name in wanted}


def parse(signature: str, text: str) -> onnx.FunctionProto:
    """Returns a function of text, ``(inputs) => (outputs)`` and lines ``result = Operator <attributes> (values)``."""
    return onnx.parser.parse_function(f'<opset_import: ["" : {OPSET}], domain: "text"> text {signature} {{{text}}}')


def insert_before(
    place: ir.Node, body: onnx.FunctionProto, given: Sequence[ir.Value], prefix: str | None
) -> list[ir.Value]:
    """Inserts the nodes of a function, applied to given values, before a node, and returns the function's outputs.

    Attributes that the body refers to are that node's. The prefix goes before the names of all nodes and values.
    """
    function = ir.serde.deserialize_function(body)
    for parameter, value in zip(function.inputs, given, strict=True):
        parameter.replace_all_uses_with(value)
    outputs, nodes = list(function.outputs), list(function)
    function.outputs.clear()
    function.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}.{node.outputs[0].name}"
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}"
        references = {name: item.ref_attr_name for name, item in node.attributes.items() if item.ref_attr_name}
        for name, reference in references.items():
            source = place.attributes[reference]
            node.attributes[name] = ir.Attr(name, source.type, source.value)
    place.prepend(nodes)
    return outputs


def replace(node: ir.Node, body: onnx.FunctionProto, given: Sequence[ir.Value]) -> None:
    """Puts the nodes of a function in place of a node; they are named after it."""
    outputs = insert_before(node, body, given, node.name)
    assert node.graph is not None  # noqa: S101 - passes see nodes of graphs alone
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [], node.outputs, outputs)


def remove_unused(model: ir.Model) -> None:
    """Removes what leads to no output: nodes, initializers and inputs."""
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
        graph.initializers.pop(str(value.name), None)
