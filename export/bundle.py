"""A checkpoint made into a bundle: graphs traced, tensors streamed, the result checked, then put in place."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import onnx

from export.check import check_bundle, check_cpu_bundle
from export.checkpoint.config import ModelConfig
from export.checkpoint.reader import Checkpoint
from export.cpu import cpu_decoder
from export.errors import CheckpointError
from export.model.trace import Graph, trace_decoder, trace_vision
from export.model.weights import embeddings_size, write_embeddings, write_weights
from export.passes.portable import portable
from export.quantized import parts
from export.writer import BundleWriter
from plugins_trt import function
from plugins_trt.schema import DOMAIN, VERSION
from runtime.bundle.manifest import CHAT_TEMPLATE, DECODER_GRAPH, TOKENIZER, VISION_GRAPH, Manifest, ModelFacts
from runtime.bundle.reader import size_text
from runtime.console.console import Console
from runtime.errors import BackendError
from runtime.images.preprocess import ImageProcessor
from runtime.packages import install_command

DEFAULT_MAX_LENGTH = 8192
"""Tokens that a conversation may have unless ``--max-length`` says otherwise. It costs the size of the rotary
tables only: caches grow as needed at run time."""

# Constants of the official code's image transform; a checkpoint does not state them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def export_bundle(
    checkpoint: Checkpoint,
    name: str,
    target: Path,
    precision: str,
    max_length: int | None,
    overwrite: bool,
    console: Console,
    opset: int = function.OPSET,
    cpu_weights: str | None = None,
) -> Manifest:
    """Writes a bundle.

    Args:
        checkpoint: an opened checkpoint.
        name: what the manifest calls it.
        target: the folder to make.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        max_length: tokens that a conversation may have; None for the default.
        overwrite: replace a bundle that is there already.
        console: told each step, and the progress.
        opset: of the graphs, as they are traced or that of ``export.passes.portable``.
        cpu_weights: one of ``export.cpu_target.CPU_WEIGHTS``, for a decoder in form ``cpu``, beside which
            ``precision`` is fp32. None for one that any runtime takes.

    Raises:
        CheckpointError: a value cannot be exported, or ``max_length`` is beyond the model's positions.
        BundleError: the target cannot be written.
    """
    config = checkpoint.config
    length = _checked_length(config, max_length)
    with BundleWriter(target, overwrite) as writer:
        console.say("tracing the graphs (no weights in memory)")
        graphs = {
            VISION_GRAPH: trace_vision(config, precision),
            DECODER_GRAPH: trace_decoder(config, precision, length),
        }
        if opset < function.OPSET:
            graphs = {file: replace(graph, model=portable(graph.model)) for file, graph in graphs.items()}
        facts = _model_facts(config, length)
        decoder = None
        if cpu_weights is not None:
            decoder = cpu_decoder(graphs.pop(DECODER_GRAPH), checkpoint, facts, cpu_weights)
        size = sum(graph.weights_size for graph in graphs.values()) + embeddings_size(config, precision)
        size += 0 if decoder is None else parts.size(decoder.parts)
        # Graphs, tokenizer and templates are a few megabytes.
        writer.require_space(size + (16 << 20))
        console.say(f"writing {size_text(size)} of weights as {cpu_weights or precision}")
        with console.bar("weights", size, "B") as advance:
            for graph in graphs.values():
                write_weights(writer, graph, checkpoint, precision, length, advance)
            if decoder is not None:
                parts.write(decoder.parts, writer, advance)
            write_embeddings(writer, checkpoint, precision, advance)
        for file, graph in graphs.items():
            writer.write(file, graph.model.SerializeToString(deterministic=True))
        writer.write(TOKENIZER, checkpoint.tokenizer_json.encode())
        template = json.dumps(checkpoint.template, indent=2, ensure_ascii=False) + "\n"
        writer.write(CHAT_TEMPLATE, template.encode())
        manifest = Manifest(
            name=name,
            precision=precision,
            model=facts,
            image=image_processor(config),
            operators=_operators(graphs),
            created_by={package: version(package) for package in ("monoedge", "torch", "onnx")},
            opset=opset,
            quantization=None if decoder is None else decoder.quantization,
        )
        if decoder is not None:
            for line in check_cpu_bundle(writer.draft(manifest), checkpoint):
                console.say(line)
            return writer.commit(manifest)
        for line in check_bundle(writer.folder, checkpoint, precision, length):
            console.say(line)
        _record(writer, manifest, console)
        return writer.commit(manifest)


def _record(writer: BundleWriter, manifest: Manifest, console: Console) -> None:
    """The recorded set, where ONNX Runtime is there to make it."""
    remedy = f"later: python -m export.recording --bundle {writer.target}"
    if find_spec("onnxruntime") is None:
        console.say(f"not recorded: onnxruntime is not installed ({install_command('onnxruntime')}); {remedy}")
        return
    from export.recorded import make as recording_make

    bundle = writer.draft(manifest)
    console.say("recording what engines will be compared with")
    try:
        with console.bar("weights", recording_make.weights_size(bundle), "B") as advance:
            files = recording_make.record(bundle, advance)
    except BackendError as error:
        console.say(f"not recorded: {error}; {remedy}")
        return
    for name, data in files.items():
        writer.write(name, data)


def _checked_length(config: ModelConfig, max_length: int | None) -> int:
    most = config.max_position_embeddings
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, most)
    if not 1 <= max_length <= most:
        raise CheckpointError(
            f"--max-length {max_length} does not fit: the checkpoint has max_position_embeddings = {most}"
        )
    return max_length


def _model_facts(config: ModelConfig, max_length: int) -> ModelFacts:
    names = [field.name for field in fields(ModelFacts) if field.name != "max_length"]
    return ModelFacts(max_length=max_length, **{name: getattr(config, name) for name in names})


def image_processor(config: ModelConfig) -> ImageProcessor:
    """How a checkpoint wants its images."""
    names = [field.name for field in fields(ImageProcessor) if field.name not in {"mean", "std"}]
    return ImageProcessor(mean=IMAGENET_MEAN, std=IMAGENET_STD, **{name: getattr(config, name) for name in names})


def _operators(graphs: dict[str, Graph]) -> dict[str, int]:
    nodes: list[onnx.NodeProto] = [node for graph in graphs.values() for node in graph.model.graph.node]
    return dict.fromkeys(sorted({node.op_type for node in nodes if node.domain == DOMAIN}), VERSION)
