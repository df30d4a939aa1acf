"""Finds a decoder's matrices, and makes the activations in front of them outputs of the graph.

A matrix is the second input of a ``Gemm``, in the graph or in the body of an operator; the activations are its first.
Nothing else is known here of what the bodies look like.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx

from export.errors import QuantizationError
from export.quantized.nodes import matrices_of


@dataclass(frozen=True)
class Matrix:
    """A matrix, and where its input can be seen.

    Attributes:
        name: of its initializer.
        layer: index of the layer; None for the head.
        part: ``feed_forward``, ``attention`` or ``lm_head``.
        expert: whose rows reach it: ``text`` or ``visual``; None where all do.
        out, channels: its shape [out, channels]; the activations are [rows, channels].
        node: name of the operator's node that holds it; empty where it stands in the graph itself.
        value: name of the activations, in the operator's body or in the graph.
    """

    name: str
    layer: int | None
    part: str
    expert: str | None
    out: int
    channels: int
    node: str
    value: str

    @property
    def output(self) -> str:
        """Name of the graph output that ``expose`` adds for it."""
        return f"{self.node}/{self.value}" if self.node else self.value


def find_matrices(model: onnx.ModelProto) -> list[Matrix]:
    """Returns all matrices of a decoder that can be quantized, in graph order."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    bodies = {(body.domain, body.name): body.node for body in model.functions}
    found = []
    for node in model.graph.node:
        body = bodies.get((node.domain, node.op_type))
        rows = {gemm.input[1]: gemm.input[0] for gemm in body or [node] if gemm.op_type == "Gemm"}
        for parameter, name in matrices_of(node).items():
            first, *rest = name.split(".")
            layer, part = (int(rest[0]), rest[1]) if first == "layers" else (None, first)
            expert = parameter.partition("_")[0] or None
            out, channels = shapes[name]
            place = (node.name if body else "", rows[parameter or name])
            found.append(Matrix(name, layer, part, expert, out, channels, *place))
    return found


def choose_matrices(
    matrices: Collection[Matrix], experts: Collection[str] = ("text",), attention: bool = False, lm_head: bool = False
) -> list[Matrix]:
    """Returns the matrices to quantize.

    Args:
        matrices: all there are.
        experts: whose matrices; those that all rows share are always among them.
        attention: whether those of the attention are quantized too.
        lm_head: whether that of the head is.
    """
    parts = {"feed_forward", *(["attention"] if attention else []), *(["lm_head"] if lm_head else [])}
    return [matrix for matrix in matrices if matrix.part in parts and matrix.expert in (*experts, None)]


def expose(model: onnx.ModelProto, matrices: Collection[Matrix]) -> onnx.ModelProto:
    """Returns a copy of a decoder, without weights, with the inputs of some matrices as further outputs.

    Operators get further outputs: the values in their bodies. The order is that of ``matrices``.

    Raises:
        QuantizationError: a value is not there.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = {node.name: node for node in copy.graph.node}
    bodies = {(body.domain, body.name): body for body in copy.functions}
    element_type = copy.graph.input[0].type.tensor_type.elem_type
    for matrix in matrices:
        if matrix.node:
            if matrix.node not in nodes:
                raise QuantizationError(f"the decoder has no node {matrix.node}: export the bundle again")
            node = nodes[matrix.node]
            body = bodies[node.domain, node.op_type]
            if matrix.value not in body.output:
                body.output.append(matrix.value)
            # A node lists its outputs in the order of its body; what is not wanted of them has no name.
            place = list(body.output).index(matrix.value)
            node.output.extend([""] * (place + 1 - len(node.output)))
            node.output[place] = matrix.output
        output = onnx.helper.make_tensor_value_info(matrix.output, element_type, [None, matrix.channels])
        copy.graph.output.append(output)
    return copy
