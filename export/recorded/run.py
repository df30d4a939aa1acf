"""Runs a bundle's graph on ONNX Runtime's CPU provider, in float32 whatever its number format, piece by piece.

A piece is a part of the graph with at most ``PIECE_BYTES`` of weights. All calls go through a piece before the next
piece is read, so that only one is in memory: a model of any size takes less than 2 GB, and its weights are read once.
The weights are a piece's inputs, not its initializers, since ONNX Runtime would copy those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from export.recorded.format import Values
from runtime.backends import Array
from runtime.backends.graph import PAST, PRESENT, UPDATE, WRITE_INDICES
from runtime.errors import as_backend_error

PIECE_BYTES = 512 << 20
"""Most bytes of float32 weights in a piece, unless one node has more: the head of the 2B model has 758 MB."""

_FLOAT32_BYTES = 4
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


@dataclass(frozen=True)
class Piece:
    """Nodes that run together, with the names of their inputs, outputs and weights."""

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


def run(graph: Path, calls: Sequence[Values], progress: Callable[[int], object]) -> list[Values]:
    """Runs a graph on several inputs, one after the other; each call has the caches that the one before it left.

    Args:
        graph: the graph's file; its external data lies beside it.
        calls: the graph's inputs, floating-point numbers in float32; caches in the first call only.
        progress: called with the bytes of weights, as they are in the file, of each piece that is done.

    Returns:
        The outputs of each call but the caches, in float32 where the graph has a half-precision format.

    Raises:
        BackendError: ONNX Runtime cannot run it.
    """
    model = onnx.load(graph, load_external_data=False)
    weights = {item.name: item for item in model.graph.initializer}
    types = to_float32(model)
    results = {item.name for item in model.graph.output}
    caches = {
        name: PAST + name.removeprefix(kind) for kind in (PRESENT, UPDATE) for name in results if name.startswith(kind)
    }
    pieces = split(model, weights, results, caches)
    # Until a call before has made them, caches have the shape of the first.
    values = [{name: calls[0][name] for name in caches.values()} | call for call in calls]
    for number, piece in enumerate(pieces):
        loaded = {name: _load(weights[name], graph.parent) for name in piece.weights}
        session = _open(_piece_model(model, piece, types), graph)
        later = {name for after in pieces[number + 1 :] for name in after.inputs} | results - caches.keys()
        for index, call in enumerate(values):
            with as_backend_error(f"ONNX Runtime failed on {graph}"):
                given = session.run(piece.outputs, {name: call[name] for name in piece.inputs} | loaded)
            call |= dict(zip(piece.outputs, given, strict=True))
            for name in caches.keys() & set(piece.outputs):
                if index + 1 < len(values):
                    values[index + 1][caches[name]] = _cache(call, name, caches[name])
        for call in values:
            for name in call.keys() - later:
                del call[name]
        read = [weights[name] for name in piece.weights]
        kinds = [onnx.helper.tensor_dtype_to_np_dtype(item.data_type) for item in read]
        progress(sum(math.prod(item.dims) * kind.itemsize for item, kind in zip(read, kinds, strict=True)))
        del session, loaded
    return values


def _cache(call: Values, output: str, past: str) -> Array:
    """Returns the cache after a call: its output, or where that is the chunk alone, the past with the chunk in it."""
    if output.startswith(PRESENT):
        return call[output]
    cache, chunk, start = call[past].copy(), call[output], int(call[WRITE_INDICES][0])
    cache[:, :, start : start + chunk.shape[2]] = chunk
    return cache


def to_float32(model: onnx.ModelProto) -> dict[str, int]:
    """Turns both half-precision formats of a graph into float32, and its weights into inputs, in place.

    Returns:
        The element type of every value, by its name.
    """
    graph = model.graph
    for item in graph.initializer:
        graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, item.dims))
    del graph.initializer[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = _wide(value.type.tensor_type.elem_type)
    for node in (*graph.node, *(node for function in model.functions for node in function.node)):
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES:
                attribute.i = _wide(attribute.i)
            if attribute.HasField("t") and _wide(attribute.t.data_type) != attribute.t.data_type:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
    # It has the old types.
    del graph.value_info[:]
    known = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *known.value_info, *known.output)}


def split(
    model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], wanted: set[str], caches: Mapping[str, str]
) -> list[Piece]:
    """Cuts a graph into pieces; constants go where they are used.

    A cache is read and written within one piece, since the next call reads it in the same piece.
    """
    sizes = {name: math.prod(item.dims) * _FLOAT32_BYTES for name, item in weights.items()}
    constants = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
    stretches: list[list[onnx.NodeProto]] = [[]]
    held: set[str] = set()
    read, made = set[str](), set[str]()
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        needs = sizes.keys() & set(node.input)
        if stretches[-1] and read <= made and sum(sizes[name] for name in held | needs) > PIECE_BYTES:
            stretches.append([])
            held = set()
        stretches[-1].append(node)
        held |= needs
        # Only a cache's shape is asked for elsewhere, which never changes.
        read |= set(caches.values()) & set(node.input) if node.op_type != "Shape" else set()
        made |= {caches[name] for name in caches.keys() & set(node.output)}
    uses = [{name for node in stretch for name in node.input if name} for stretch in stretches]
    pieces = []
    for number, stretch in enumerate(stretches):
        given = {name for node in stretch for name in node.output}
        later = set().union(*uses[number + 1 :], wanted)
        pieces.append(
            Piece(
                nodes=(*(constants[name] for name in sorted(uses[number] & constants.keys())), *stretch),
                inputs=tuple(sorted(uses[number] - given - constants.keys() - sizes.keys())),
                outputs=tuple(sorted(given & later)),
                weights=tuple(sorted(uses[number] & sizes.keys())),
            )
        )
    return pieces


def _piece_model(model: onnx.ModelProto, piece: Piece, types: Mapping[str, int]) -> bytes:
    # Without shapes: those of one call need not be those of the next.
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(name, types[name], None) for name in names]
        for names in ((*piece.inputs, *piece.weights), piece.outputs)
    )
    cut = onnx.helper.make_model(
        onnx.helper.make_graph(piece.nodes, model.graph.name, inputs, outputs),
        opset_imports=model.opset_import,
        functions=model.functions,
        ir_version=model.ir_version,
    )
    return bytes(cut.SerializeToString())


def _open(model: bytes, graph: Path) -> Any:  # noqa: ANN401 - ONNX Runtime is not typed
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The memory of one piece is freed before the next.
    options.enable_cpu_mem_arena = False
    with as_backend_error(f"ONNX Runtime cannot load {graph}"):
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _load(item: onnx.TensorProto, folder: Path) -> Array:
    """Reads a weight: floating-point ones as float32, memory-mapped where the file has that type."""
    if uses_external_data(item):
        place, kind = ExternalDataInfo(item), onnx.helper.tensor_dtype_to_np_dtype(item.data_type)
        array: Array = np.memmap(folder / place.location, kind, "r", place.offset or 0, tuple(item.dims))
    else:
        array = onnx.numpy_helper.to_array(item)
    return array if _wide(item.data_type) == item.data_type else array.astype(np.float32)


def _wide(kind: int) -> int:
    half = kind in (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)
    return int(onnx.TensorProto.FLOAT) if half else kind
