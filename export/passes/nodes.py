"""What passes share: nodes written as ONNX text, and what is known of a graph's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.parser

from runtime.errors import BundleError

OPSET = 20
"""Opset of portable graphs: TensorRT 10.3 reads up to it, ONNX Runtime from 1.17 on."""


@dataclass(frozen=True)
class ValueInfo:
    """Element types and shapes of the values of a graph, as strict shape inference found them."""

    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int | str, ...]]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> ValueInfo:
        """Infers them; weights need not be there.

        Raises:
            BundleError: the graph contradicts itself.
        """
        try:
            graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
        except onnx.shape_inference.InferenceError as error:
            raise BundleError(
                f'the graph "{model.graph.name}" does not pass shape inference: {str(error).splitlines()[0]}'
            ) from None
        values = (*graph.input, *graph.value_info, *graph.output)
        tensors = {value.name: value.type.tensor_type for value in values}
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        return cls(
            {name: tensor.elem_type for name, tensor in tensors.items()}
            | {name: tensor.data_type for name, tensor in initializers.items()},
            {name: tuple(_size(dim) for dim in tensor.shape.dim) for name, tensor in tensors.items()}
            | {name: tuple(tensor.dims) for name, tensor in initializers.items()},
        )

    def sizes(self, name: str, *axes: int) -> tuple[int, ...]:
        """Some of a value's dimensions, which have to be numbers.

        Raises:
            BundleError: one is not.
        """
        shape = self.shapes.get(name, ())
        sizes = tuple(shape[axis] for axis in axes if axis < len(shape))
        numbers = tuple(size for size in sizes if isinstance(size, int))
        if len(numbers) != len(axes):
            raise BundleError(f'"{name}" has no fixed sizes in the dimensions {axes}: export the bundle again')
        return numbers


def _size(dimension: onnx.TensorShapeProto.Dimension) -> int | str:
    return dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param


def parse_nodes(text: str, prefix: str, **values: str) -> list[onnx.NodeProto]:
    """Nodes of ONNX text, one ``result = Operator <attributes> (values)`` a line.

    Args:
        text: the lines.
        prefix: goes before the names of all nodes, and of the values that are not in ``values``.
        values: names in the text that stand for values of the graph.
    """
    function = onnx.parser.parse_function(f'<opset_import: ["" : {OPSET}], domain: "text"> text () => () {{{text}}}')
    for node in function.node:
        node.name = f"{prefix}.{node.output[0]}"
        for names in (node.input, node.output):
            names[:] = [values.get(name, f"{prefix}.{name}") for name in names]
    return list(function.node)


def attributes(node: onnx.NodeProto, wanted: tuple[str, ...], **fixed: int | str) -> dict[str, Any]:
    """The attributes of these names that a node has.

    Raises:
        BundleError: it has another one, or one that is ``fixed`` with another value: a pass would lose it.
    """
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    for name, value in given.items():
        got = value.decode() if isinstance(value, bytes) else value
        if name not in wanted and (name not in fixed or got != fixed[name]):
            raise BundleError(
                f"{node.op_type} {node.name} has {name} = {got}, which is not known: export the bundle again"
            )
    return {name: value for name, value in given.items() if name in wanted}
