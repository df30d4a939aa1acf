"""What is built from a bundle: two plans, each with its graph as TensorRT wants it, its profiles and its name.

Nothing here needs TensorRT, and nothing is written: parsers take the edited graph from memory, and find the weights by
the path of the original.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from export.engines.network import (
    CAPACITY,
    InputShapes,
    Range,
    decoder_profiles,
    fix_dimension,
    input_shapes,
    vision_profile,
)
from export.engines.options import Options
from export.engines.parser import check_graph, load_parser
from export.passes.nodes import load_graph
from export.passes.portable import portable
from plugins_trt.schema import DOMAIN, VERSION
from runtime.bundle.engines import WEIGHTS, plan_name
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH, EngineRecord, FileRecord, Manifest
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import Target

PREFILL_CHUNK = 1024
"""Tokens that the prefill profile takes at once, as many as four tiles of an image; longer prompts come in chunks."""

PORTABLE_CHUNK = 512
"""The same for portable graphs, whose scores, [heads, chunk, capacity + chunk], may all be in memory in float32."""


@dataclass(frozen=True)
class Plan:
    """One plan to build.

    Attributes:
        name: in the bundle and its manifest.
        graph: its graph file in the bundle.
        model: the graph as TensorRT wants it, without weights.
        profiles: the shapes of all inputs in each optimization profile.
    """

    name: str
    graph: str
    model: onnx.ModelProto
    profiles: tuple[dict[str, InputShapes], ...]

    @property
    def standard_operators(self) -> list[str]:
        """The operators of ONNX in the graph, which the parser must have."""
        return sorted({node.op_type for node in self.model.graph.node if node.domain != DOMAIN})

    @property
    def plugins(self) -> dict[str, int]:
        """Name and version of each plugin in the graph."""
        names = sorted({node.op_type for node in self.model.graph.node if node.domain == DOMAIN})
        return dict.fromkeys(names, VERSION)


def plans(bundle: Bundle, options: Options) -> tuple[Plan, Plan]:
    """Returns the plan of the decoder, whose two profiles share its weights, and that of the vision graph.

    Raises:
        BundleError: a graph cannot be read, or the target's parser does not have one of its operators.
    """
    manifest = bundle.manifest
    decoder, vision = (graph_for(options.target, bundle, name) for name in (DECODER_GRAPH, VISION_GRAPH))
    fix_dimension(decoder, CAPACITY, options.max_length)
    chunk = min(PREFILL_CHUNK if options.target.parser is None else PORTABLE_CHUNK, options.max_length)
    ranges = decoder_profiles(options.max_length, chunk, options.max_batch)
    image = manifest.image
    tiles = image.max_tiles + int(image.use_thumbnail and image.max_tiles > 1)

    def plan(graph: str, model: onnx.ModelProto, *profiles: dict[str, Range]) -> Plan:
        name = plan_name(graph, options.target.name, options.capability, manifest.precision)
        return Plan(name, graph, model, tuple(input_shapes(model, profile) for profile in profiles))

    return plan(DECODER_GRAPH, decoder, *ranges), plan(VISION_GRAPH, vision, vision_profile(tiles))


def graph_for(target: Target, bundle: Bundle, name: str) -> onnx.ModelProto:
    """Reads a graph and rewrites it for the target's parser; weights and function bodies are left out.

    Raises:
        BundleError: it cannot be read, or the parser does not have one of its operators.
    """
    model = load_graph(bundle, name)
    if target.parser is not None:
        model = portable(model)
        check_graph(model, load_parser(target.parser))
    # Up to TensorRT 10.6 a parser takes the body even where there is a plugin.
    del model.functions[:]
    return model


def record(manifest: Manifest, options: Options, graph: str, file: FileRecord, tensorrt: str) -> EngineRecord:
    """Returns what the manifest will say of a plan that this version of TensorRT built from ``graph``."""
    return EngineRecord(
        **vars(file),
        graph=graph,
        target=options.target.name,
        tensorrt=tensorrt,
        compute_capability=options.capability,
        plugin_sha256=options.plugin_sha256 if graph == DECODER_GRAPH else "",
        graph_sha256=manifest.files[graph].sha256,
        weights_sha256=manifest.files[WEIGHTS[graph]].sha256,
        max_length=options.max_length,
        max_batch=options.max_batch,
    )
