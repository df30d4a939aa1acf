"""Nodes of constants alone → the constant that they make; then what nobody uses is taken out.

Rule: ``Constant`` nodes and what follows from them only, never weights. The exporter writes ``Slice`` with axes that
are a ``Reshape`` of a constant, where older parsers take nothing but a constant.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator


def fold_constants(model: onnx.ModelProto) -> None:
    """Computes them, in place."""
    graph = model.graph
    values: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    nodes = []
    for node in graph.node:
        if node.domain or not all(name in values for name in node.input) or len(node.output) != 1:
            nodes.append(node)
            continue
        (name,) = node.output
        (value,) = ReferenceEvaluator(node).run(None, {given: values[given] for given in node.input})
        values[name] = np.asarray(value)
        made = numpy_helper.from_array(values[name], name)
        nodes.append(node if not node.input else onnx.helper.make_node("Constant", [], [name], node.name, value=made))
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
