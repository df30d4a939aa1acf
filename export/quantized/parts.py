"""A rewritten decoder as the files of a bundle: one graph, or for a CPU one for each kind of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from export.passes.by_expert import for_expert
from export.passes.group_query_attention import group_query_attention
from export.passes.int8_caches import CachePlan
from export.quantized.contents import Content, place
from export.quantized.rewrite import Rewritten
from export.writer import ALIGNMENT, BundleWriter
from runtime.bundle.manifest import (
    CPU,
    DECODER_GRAPH,
    DECODER_WEIGHTS,
    VISUAL_DECODER_GRAPH,
    VISUAL_DECODER_WEIGHTS,
    ModelFacts,
)
from runtime.console.console import Advance


@dataclass(frozen=True)
class Part:
    """One graph, and the data of those of its initializers that lie in its own file of weights."""

    graph: str
    weights: str
    model: onnx.ModelProto
    contents: Mapping[str, Content]


def parts(rewritten: Rewritten, form: str, facts: ModelFacts, caches: Sequence[CachePlan] = ()) -> list[Part]:
    """The graphs of a decoder in a form; ``caches`` are those to store in INT8, in form ``cpu`` alone.

    In form ``cpu`` each kind of tokens has a graph with its own experts alone (``export.passes.by_expert``), so that a
    conversation of text never opens the visual experts' weights: ONNX Runtime copies what ``MatMulNBits`` takes into a
    layout of its own, all of it, when it opens a graph. What both use lies in the text decoder's file.

    Raises:
        QuantizationError: a decoder of another form than this monoedge exports, or plans of caches that do not fit it.
    """
    if form != CPU:
        return [Part(DECODER_GRAPH, DECODER_WEIGHTS, rewritten.model, rewritten.contents)]
    whole = onnx.ModelProto()
    whole.CopyFrom(rewritten.model)
    group_query_attention(whole, facts, caches)
    text, visual = for_expert(whole, "text"), for_expert(whole, "visual")
    first = _placed(text.graph, rewritten.contents, DECODER_WEIGHTS, {})
    shared = {tensor.name: tensor for tensor in text.graph.initializer}
    second = _placed(visual.graph, rewritten.contents, VISUAL_DECODER_WEIGHTS, shared)
    return [
        Part(DECODER_GRAPH, DECODER_WEIGHTS, text, first),
        Part(VISUAL_DECODER_GRAPH, VISUAL_DECODER_WEIGHTS, visual, second),
    ]


def _placed(
    graph: onnx.GraphProto, contents: Mapping[str, Content], file: str, elsewhere: Mapping[str, onnx.TensorProto]
) -> dict[str, Content]:
    """Lays out those initializers of a graph that have data and are not elsewhere; returns what lies in its file."""
    names = [tensor.name for tensor in graph.initializer]
    own = {name: contents[name] for name in names if name in contents and name not in elsewhere}
    placed = {tensor.name: tensor for tensor in place(own, file)} | dict(elsewhere)
    tensors = [placed.get(tensor.name, tensor) for tensor in graph.initializer]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    return own


def size(decoder: Sequence[Part]) -> int:
    """Bytes of all weights."""
    return sum(content.size for part in decoder for content in part.contents.values())


def write(decoder: Sequence[Part], writer: BundleWriter, advance: Advance) -> None:
    """Writes graphs and weights, the latter some rows at a time."""
    for part in decoder:
        _write_weights(part, writer, advance)
        writer.write(part.graph, part.model.SerializeToString(deterministic=True))


def _write_weights(part: Part, writer: BundleWriter, advance: Advance) -> None:
    file = writer.open(part.weights)
    try:
        for name, content in part.contents.items():
            file.pad_to(ALIGNMENT)
            start = file.size
            for block in content.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
                file.write(data.data)
                advance(data.nbytes)
            if file.size - start != content.size:
                raise AssertionError(f"{name} should have {content.size} bytes, got {file.size - start}")
    finally:
        file.close()
    writer.add(part.weights, file)
