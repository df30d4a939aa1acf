"""Traces the PyTorch modules: ONNX graphs without weights.

The modules are built and traced under fake tensors, which have shapes and types but no data, so that tracing the
full-size model takes a few hundred megabytes. Initializers of the result point into a file of external data that is
still to be written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import decoder_parameters, vision_parameters
from export.engines.plan import CAPACITY
from export.external_data import GraphFile, TensorSource, layout
from export.model import modeling
from export.model.weights import DTYPES, parameter_sources, rotary_sources
from plugins_trt import function
from plugins_trt.schema import DOMAIN
from runtime.backends import graph as names
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH, weights_of


def trace_vision(checkpoint: Checkpoint, precision: str) -> GraphFile:
    """Returns ``vision.onnx``: pixel_values [tiles, 3, size, size] → visual_embeds [tiles, tokens_per_tile, hidden]."""
    config = checkpoint.config
    with FakeTensorMode(), modeling.default_dtype(DTYPES[precision]):
        module = modeling.Vision(config).eval()
        pixels = torch.empty(2, 3, config.image_size, config.image_size)
        shapes = ({0: Dim("tiles", min=1, max=4096)},)
        program = _export(module, (pixels,), shapes, [names.PIXEL_VALUES], [names.VISUAL_EMBEDS])
    tensors = parameter_sources(checkpoint, vision_parameters(config), precision)
    return _finish(program, VISION_GRAPH, tensors)


def trace_decoder(checkpoint: Checkpoint, precision: str, max_length: int) -> GraphFile:
    """Returns ``decoder.onnx``: see ``modeling.Decoder.forward``. Each cache is an input and an output of its own."""
    config = checkpoint.config
    caches = names.cache_names(config.num_hidden_layers)
    batch, sequence, capacity = Dim("batch", max=1024), Dim("sequence", max=1 << 20), Dim(CAPACITY, max=1 << 20)
    with FakeTensorMode(), modeling.default_dtype(DTYPES[precision]):
        module = modeling.Decoder(config, max_length).eval()
        arguments = (
            torch.empty(2, 3, config.hidden_size),
            torch.empty(2, 3, dtype=torch.bool),
            torch.empty(2, 3, dtype=torch.int64),
            torch.empty(2, dtype=torch.int64),
            [torch.empty(2, config.num_key_value_heads, 16, config.head_dim) for _ in caches],
        )
        tokens = {0: batch, 1: sequence}
        given = (names.INPUTS_EMBEDS, names.VISUAL_MASK, names.POSITION_IDS, names.WRITE_INDICES)
        program = _export(
            module,
            arguments,
            (tokens, tokens, tokens, {0: batch}, [{0: batch, 2: capacity}] * len(caches)),
            [*given, *(names.PAST + name for name in caches)],
            [names.LOGITS, *(names.PRESENT + name for name in caches)],
        )
    tensors = parameter_sources(checkpoint, decoder_parameters(config), precision)
    tensors |= rotary_sources(checkpoint, max_length, precision)
    return _finish(program, DECODER_GRAPH, tensors)


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
        )
    assert program is not None  # noqa: S101 - only with dynamo=False
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's warnings, which are for its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _finish(model: ir.Model, name: str, tensors: dict[str, TensorSource]) -> GraphFile:
    """Moves initializers to external data, names nodes after modules, and removes traces of the exporting machine."""
    graph = model.graph
    graph.name = name.removesuffix(".onnx")
    if set(graph.initializers) != set(tensors):
        raise AssertionError(f"the map and the model disagree: {set(graph.initializers) ^ set(tensors)}")
    for parameter, proto in layout(tensors, weights_of(name)).items():
        value, tensor = graph.initializers[parameter], ir.serde.deserialize_tensor(proto)
        if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            raise AssertionError(f"the map says {tensor}, the model has {value}")
        value.const_value = tensor
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _constants_as_tensors(graph)
    _name_by_place(graph)
    _drop_traces(model)
    made = ir.to_proto(model)
    made.ir_version = 11
    made.producer_name, made.producer_version = "monoedge", ""
    used = {node.op_type for node in made.graph.node if node.domain == DOMAIN}
    made.functions.extend(function.bodies(used))
    return GraphFile(name, made, tensors)


def _constants_as_tensors(graph: ir.Graph) -> None:
    """Gives constants their values as tensors: of ``value_floats`` and the like, polygraphy makes float64."""
    for node in graph:
        if node.op_type == "Constant" and "value" not in node.attributes:
            (attribute,) = node.attributes.values()
            kind = np.int64 if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS) else np.float32
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array(attribute.value, kind)))


def _name_by_place(graph: ir.Graph) -> None:
    """Names nodes and their outputs by module and operator, as ``layers.0.feed_forward/FusedMoE``.

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
    """Removes stack traces: they would make the bytes depend on where monoedge is installed."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph = model.graph
    for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        value.metadata_props.clear()
