"""Tracing: the PyTorch modules to ONNX graphs, without weights.

The modules are built and traced under fake tensors, which have shapes and types but no data, so that tracing the
full-size model takes a few hundred megabytes. Initializers of the result point into an external data file that
``export.model.weights`` writes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from export.checkpoint.config import ModelConfig
from export.checkpoint.tensors import Parameter, decoder_parameters, vision_parameters
from export.engines.network import CAPACITY
from export.model import modeling
from export.model.fused_moe import translation_table
from export.writer import ALIGNMENT
from plugins_trt import function
from plugins_trt.schema import DOMAIN
from runtime.bundle.manifest import DECODER_WEIGHTS, VISION_WEIGHTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Slot:
    """Where one initializer lies in the external data file."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Graph:
    """A traced graph, its external data file and what belongs where in it."""

    model: onnx.ModelProto
    weights_file: str
    slots: tuple[Slot, ...]

    @property
    def weights_size(self) -> int:
        """Size of the external data file in bytes."""
        return max(slot.offset + slot.size for slot in self.slots)


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the caches in graph order; ``prefix`` is ``past_key_values`` for inputs, ``present`` for outputs."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def trace_vision(config: ModelConfig, precision: str) -> Graph:
    """``vision.onnx``: pixel_values [tiles, 3, size, size] → visual_embeds [tiles, tokens_per_tile, hidden]."""
    dtype = DTYPES[precision]
    with FakeTensorMode(), modeling.default_dtype(dtype):
        module = modeling.Vision(config).eval()
        pixels = torch.empty(2, 3, config.image_size, config.image_size)
        program = _export(module, (pixels,), ({0: Dim("tiles", min=1, max=4096)},), ["pixel_values"], ["visual_embeds"])
    return _finish(program, "vision", vision_parameters(config), [], dtype, VISION_WEIGHTS)


def trace_decoder(config: ModelConfig, precision: str, max_length: int) -> Graph:
    """``decoder.onnx``: see ``modeling.Decoder.forward``; the caches are inputs and outputs one by one."""
    dtype = DTYPES[precision]
    layers = config.num_hidden_layers
    batch, sequence, capacity = (
        Dim("batch", max=1024),
        Dim("sequence", max=1 << 20),
        Dim(CAPACITY, max=1 << 20),
    )
    with FakeTensorMode(), modeling.default_dtype(dtype):
        module = modeling.Decoder(config, max_length).eval()
        cache = torch.empty(2, config.num_key_value_heads, 16, config.head_dim)
        arguments = (
            torch.empty(2, 3, config.hidden_size),
            torch.empty(2, 3, dtype=torch.bool),
            torch.empty(2, 3, dtype=torch.int64),
            torch.empty(2, dtype=torch.int64),
            [torch.empty_like(cache) for _ in range(2 * layers)],
        )
        tokens = {0: batch, 1: sequence}
        program = _export(
            module,
            arguments,
            (tokens, tokens, tokens, {0: batch}, [{0: batch, 2: capacity}] * (2 * layers)),
            [
                "inputs_embeds",
                "visual_mask",
                "position_ids",
                "write_indices",
                *cache_names(layers, "past_key_values"),
            ],
            ["logits", *cache_names(layers, "present")],
        )
    rope = (max_length, config.head_dim // 2)
    tables = [Parameter("rope.cos", rope, ()), Parameter("rope.sin", rope, ())]
    return _finish(program, "decoder", decoder_parameters(config), tables, dtype, DECODER_WEIGHTS)


def _export(
    module: torch.nn.Module,
    arguments: tuple[object, ...],
    dynamic_shapes: tuple[object, ...],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    with _quiet():
        # optimize=True would run passes that look at the data of initializers, which fake tensors do not have.
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=function.OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table=translation_table(),
        )
    assert program is not None  # noqa: S101 - only with dynamo=False
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's advice to its own developers is no use to ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _finish(
    model: ir.Model,
    name: str,
    parameters: list[Parameter],
    tables: list[Parameter],
    dtype: torch.dtype,
    weights_file: str,
) -> Graph:
    """Initializers into external data, readable node names, no traces of the exporting machine."""
    graph = model.graph
    graph.name = name
    expected = {parameter.name: parameter for parameter in parameters + tables}
    if set(graph.initializers) != set(expected):
        raise AssertionError(f"the map and the model disagree: {set(graph.initializers) ^ set(expected)}")
    offset, slots = 0, []
    for parameter in expected.values():
        value = graph.initializers[parameter.name]
        shape = value.shape.numpy() if value.shape is not None else ()
        if shape != parameter.shape:
            raise AssertionError(f"{parameter.name}: the map says {parameter.shape}, the model has {shape}")
        size = torch.Size(shape).numel() * dtype.itemsize
        slots.append(Slot(parameter.name, shape, offset, size))
        assert value.dtype is not None  # noqa: S101 - the exporter types every initializer
        value.const_value = ir.ExternalTensor(
            weights_file, offset, size, value.dtype, shape=ir.Shape(shape), name=parameter.name
        )
        offset = -(-(offset + size) // ALIGNMENT) * ALIGNMENT
    for simplify in (
        IdentityEliminationPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    ):
        simplify(model)
    _constants_as_tensors(graph)
    _name_by_place(graph)
    _drop_traces(model)
    proto = ir.to_proto(model)
    proto.ir_version = 11
    proto.producer_name, proto.producer_version = "monoedge", ""
    used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    del proto.functions[:]
    proto.functions.extend(function.bodies(used))
    return Graph(proto, weights_file, tuple(slots))


def _constants_as_tensors(graph: ir.Graph) -> None:
    """Gives constants their values as tensors: of ``value_floats`` and the like, polygraphy makes float64."""
    for node in graph:
        if node.op_type == "Constant" and "value" not in node.attributes:
            (attribute,) = node.attributes.values()
            kind = np.int64 if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS) else np.float32
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array(attribute.value, kind)))


def _name_by_place(graph: ir.Graph) -> None:
    """Nodes and their outputs are named by module and operator, as ``layers.0.feed_forward/FusedMoE``.

    Errors of ONNX Runtime and TensorRT quote these names.
    """
    kept = {output.name for output in graph.outputs}
    seen: Counter[str] = Counter()
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "").strip("[]").replace("'", "").split(", ")
        module = scopes[-2] if len(scopes) > 1 else ""
        base = f"{module}/{node.op_type}" if module else node.op_type
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        for index, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = f"{node.name}:{index}" if index else node.name


def _drop_traces(model: ir.Model) -> None:
    """Stack traces would make the bytes depend on where monoedge is installed."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
