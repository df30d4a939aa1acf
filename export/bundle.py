"""Makes a bundle of a checkpoint: graphs traced, tensors streamed, the result checked, then put in place."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import tokenizers

import runtime
from export.check import check_forward
from export.checkpoint.config import ModelConfig
from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import embedding_parameter
from export.external_data import GraphFile, operators, write_graphs
from export.model.trace import trace_decoder, trace_vision
from export.model.weights import parameter_source
from export.options import CPU_TARGET, CPU_WEIGHTS, ExportOptions
from export.passes.portable import portable
from export.quantized.plan import MatrixPlan, QuantizationPlan
from export.quantized.quantizable import find_matrices
from export.quantized.rewrite import decoder_files
from export.quantized.weights import Weights
from export.writer import BundleWriter
from plugins_trt.function import opset_of
from plugins_trt.schema import W8A16
from runtime.bundle.manifest import CHAT_TEMPLATE, CPU, EMBEDDINGS, TOKENIZER, W4A16, Manifest, ModelFacts, Quantization
from runtime.bundle.reader import Bundle
from runtime.console.console import Console
from runtime.errors import BackendError
from runtime.images.preprocess import ImageProcessor
from runtime.packages import install_command
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

# Constants of the official code's image transform; a checkpoint does not state them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def export_bundle(checkpoint: Checkpoint, name: str, path: Path, options: ExportOptions, console: Console) -> Manifest:
    """Writes the bundle of a checkpoint into a new folder, ``path``; the manifest calls it ``name``.

    Raises:
        CheckpointError: a value cannot be exported, or the graphs do not compute what PyTorch does.
        OptionError: ``max_length`` is beyond the model's positions.
        BundleError: the bundle cannot be written.
    """
    config = checkpoint.config
    facts = ModelFacts(max_length=options.length(config.max_position_embeddings), **_shared(config, ModelFacts))
    with BundleWriter(path, options.overwrite) as writer:
        console.say("tracing the graphs (no weights in memory)")
        vision = trace_vision(checkpoint, options.precision)
        decoder = trace_decoder(checkpoint, options.precision, facts.max_length)
        graphs, quantization = _for_target(vision, decoder, facts, options)
        embeddings = parameter_source(checkpoint, embedding_parameter(config), options.precision)
        write_graphs(writer, graphs, console, {EMBEDDINGS: embeddings})
        writer.write(TOKENIZER, checkpoint.tokenizer_json.encode())
        template = json.dumps(checkpoint.template, indent=2, ensure_ascii=False) + "\n"
        writer.write(CHAT_TEMPLATE, template.encode())
        manifest = Manifest(
            name=name,
            precision=options.precision,
            model=facts,
            image=image_processor(config),
            operators=operators(graphs),
            created_by={"monoedge": runtime.__version__, "torch": version("torch"), "onnx": onnx.__version__},
            opset=opset_of(graphs[0].model),
            quantization=quantization,
        )
        bundle = writer.draft(manifest)
        console.say(check_forward(bundle, checkpoint))
        if not bundle.manifest.by_expert:
            _record(writer, bundle, console)
        return writer.commit(manifest)


def _for_target(
    vision: GraphFile, decoder: GraphFile, facts: ModelFacts, options: ExportOptions
) -> tuple[list[GraphFile], Quantization | None]:
    """Returns the graphs to write, and what of them is quantized."""
    if options.target is None:
        return [vision, decoder], None
    if options.target != CPU_TARGET:
        return [replace(graph, model=portable(graph.model)) for graph in (vision, decoder)], None
    plan = _plan(decoder.model, CPU_WEIGHTS[options.weights or "fp32"])
    files = decoder_files(Weights(decoder.model, decoder.tensors), plan, CPU, facts)
    return [vision, *files], plan.manifest_entry(CPU)


def _plan(decoder: onnx.ModelProto, bits: tuple[int, int] | None) -> QuantizationPlan:
    """Returns a plan without calibration data: each block of a row has a scale of its own, from the weights alone."""
    if bits is None:
        return QuantizationPlan(W8A16, ())
    experts, others = bits
    matrices = find_matrices(decoder)
    return QuantizationPlan(
        W4A16 if experts == 4 else W8A16,
        tuple(MatrixPlan(m.name, None, bits=experts if m.part == "feed_forward" else others) for m in matrices),
    )


def _record(writer: BundleWriter, bundle: Bundle, console: Console) -> None:
    """Adds the recorded set, where ONNX Runtime is there to make it."""
    remedy = f"later: python -m export.recording --bundle {shlex.quote(str(writer.target))}"
    if find_spec("onnxruntime") is None:
        console.say(f"not recorded: onnxruntime is not installed ({install_command('onnxruntime')}); {remedy}")
        return
    from export.recorded import make as recording_make

    console.say("recording what engines will be compared with")
    try:
        with console.bar("weights", recording_make.weights_size(bundle), "B") as advance:
            files = recording_make.record(bundle, advance)
    except BackendError as error:
        console.say(f"not recorded: {error}; {remedy}")
        return
    for name, data in files.items():
        writer.write(name, data)


def image_processor(config: ModelConfig) -> ImageProcessor:
    """Returns how images are prepared for a checkpoint."""
    return ImageProcessor(mean=IMAGENET_MEAN, std=IMAGENET_STD, **_shared(config, ImageProcessor))


def least_length(checkpoint: Checkpoint) -> int:
    """Returns the tokens of the shortest question about a picture, and one of its answer."""
    image = image_processor(checkpoint.config)
    chat = ChatTemplate.from_json(checkpoint.template)
    question = chat.place_images("?", [image.fewest_tiles(1, 1)], image.tokens_per_tile)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json))
    return len(tokenizer.encode(chat.render([(question, None)]))) + 1


def _shared(config: ModelConfig, kind: type[ModelFacts | ImageProcessor]) -> dict[str, Any]:
    """Returns the fields of a dataclass that the config has by the same names."""
    return {field.name: getattr(config, field.name) for field in fields(kind) if hasattr(config, field.name)}
