"""Which operators the ONNX parser of an older TensorRT has, and whether a graph uses only those.

A build asks the parser itself. This check works on a machine without that TensorRT, and names the node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from export.passes.nodes import infer_types
from plugins_trt.function import opset_of
from plugins_trt.schema import DOMAIN
from runtime.errors import BundleError

_TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
"""TensorRT's names of types, where they are not ONNX's."""


@dataclass(frozen=True)
class Parser:
    """One version's parser.

    Attributes:
        tensorrt: the version.
        opset: the newest that it reads.
        operators: by name, the types of tensors that it takes.
        constant_axes: by name, which input has to be a constant.
    """

    tensorrt: str
    opset: int
    operators: Mapping[str, frozenset[str]]
    constant_axes: Mapping[str, int]


def load_parser(name: str) -> Parser:
    """Reads a file of ``export/engines/parsers``, which names the sources of its facts."""
    values = json.loads((Path(__file__).parent / "parsers" / name).read_text(encoding="utf-8"))
    operators = {operator: frozenset(types.split()) for operator, types in values["operators"].items()}
    return Parser(values["tensorrt"], values["opset"], operators, values["constant_axes"])


def check_graph(model: onnx.ModelProto, parser: Parser) -> None:
    """Checks every node except plugins, whose function bodies the model has, since types are inferred from them.

    Raises:
        BundleError: the parser does not have an operator, or not for these types.
    """
    title = f"the ONNX parser of TensorRT {parser.tensorrt}"
    if opset_of(model) > parser.opset:
        raise BundleError(f"{model.graph.name}: {title} reads opset {parser.opset}, the graph is of {opset_of(model)}")
    for node in infer_types(model).graph:
        if node.domain == DOMAIN:
            continue
        what = f"{model.graph.name}, {node.name}: {title}"
        if node.domain or node.op_type not in parser.operators:
            domain = f" of domain {node.domain}" if node.domain else ""
            raise BundleError(f"{what} does not have {node.op_type}{domain}: export the bundle again")
        # Of quantization, the types listed are those of what is quantized, not of scales and zero points.
        typed = node.inputs[:1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else node.inputs
        for value in filter(None, typed):
            name = "" if value.dtype is None else value.dtype.name
            kind = _TYPES.get(name, name)
            if kind not in parser.operators[node.op_type]:
                raise BundleError(f"{what} does not have {node.op_type} for {kind}: export the bundle again")
        axes = parser.constant_axes.get(node.op_type)
        given = node.inputs[axes] if axes is not None and axes < len(node.inputs) else None
        if given is not None and ir.convenience.get_const_tensor(given) is None:
            raise BundleError(f"{what} takes {node.op_type} with constant axes only: export the bundle again")
