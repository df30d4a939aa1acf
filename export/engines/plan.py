"""What is built from a bundle: two plans, each with its graph as TensorRT wants it, its profiles and its name.

TensorRT wants caches of fixed capacity, and shapes for each optimization profile. Nothing here needs it, and nothing is
written: parsers take the edited graph from memory, and find the weights by the path of the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx

from export.engines.options import Options
from export.engines.parser import check_graph, load_parser
from export.passes.nodes import load_graph
from export.passes.portable import portable
from plugins_trt.schema import DOMAIN, VERSION
from runtime.bundle.engines import WEIGHTS, plan_name
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH, EngineRecord, FileRecord, Manifest
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import Target
from runtime.errors import BundleError, OptionError

CAPACITY = "capacity"
"""The symbolic dimension of the caches in exported graphs: tokens that a cache holds."""

PREFILL_CHUNK = 1024
"""Tokens that the prefill profile takes at once, as many as four tiles of an image; longer prompts come in chunks."""

PORTABLE_CHUNK = 512
"""The same for portable graphs, whose scores, [heads, chunk, capacity + chunk], may all be in memory in float32."""


class Range(NamedTuple):
    """Sizes that a symbolic dimension has in one profile; TensorRT tunes for the optimum."""

    minimum: int
    optimum: int
    maximum: int

    @classmethod
    def only(cls, size: int) -> Range:
        """Returns the range of one size."""
        return cls(size, size, size)


class InputShapes(NamedTuple):
    """Shapes of one input in one profile."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


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


def fix_dimension(model: onnx.ModelProto, name: str, size: int) -> None:
    """Replaces a symbolic dimension of a graph by a number, in place.

    TensorRT refuses caches of open capacity ("The KV cache tensor must have a static sequence length dimension").
    Shapes of values inside the graph are dropped, since they may be expressions in the old name; parsers infer them.

    Raises:
        OptionError: the size is not positive.
        BundleError: no input has such a dimension.
    """
    if size < 1:
        raise OptionError(f"{name} must be 1 or more, got {size}")
    values = (*model.graph.input, *model.graph.output)
    found = [item for value in values for item in value.type.tensor_type.shape.dim if item.dim_param == name]
    if not found:
        raise BundleError(f'the graph "{model.graph.name}" has no dimension "{name}": export the bundle again')
    for dimension in found:
        dimension.dim_value = size
    del model.graph.value_info[:]


def decoder_profiles(capacity: int, chunk: int, batch: int = 1) -> tuple[dict[str, Range], dict[str, Range]]:
    """Returns the two profiles of a decoder: prefill of up to ``chunk`` tokens at once, and decode of one.

    TensorRT tunes each profile for its optimum, and kernels that are fast for one row are slow for a thousand.

    Raises:
        OptionError: the chunk does not fit the cache.
    """
    if not 1 <= chunk <= capacity:
        raise OptionError(f"a prefill chunk must be from 1 to the cache's capacity of {capacity} tokens, got {chunk}")
    if batch < 1:
        raise OptionError(f"batch must be 1 or more, got {batch}")
    rows = Range.only(batch)
    return {"batch": rows, "sequence": Range(1, chunk, chunk)}, {"batch": rows, "sequence": Range.only(1)}


def vision_profile(most_tiles: int) -> dict[str, Range]:
    """Returns the profile of the vision graph: from one tile to as many as the image processor makes.

    Raises:
        OptionError: fewer than one tile.
    """
    if most_tiles < 1:
        raise OptionError(f"tiles must be 1 or more, got {most_tiles}")
    return {"tiles": Range(1, most_tiles, most_tiles)}


def input_shapes(model: onnx.ModelProto, profile: Mapping[str, Range]) -> dict[str, InputShapes]:
    """Returns the shapes of all inputs of a graph in one profile, by name, in graph order.

    Raises:
        BundleError: the graph has a symbolic dimension that the profile does not give.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    return {
        value.name: InputShapes(*zip(*_ranges(value, profile), strict=True))
        for value in model.graph.input
        if value.name not in weights
    }


def _ranges(value: onnx.ValueInfoProto, profile: Mapping[str, Range]) -> Iterator[Range]:
    for dimension in value.type.tensor_type.shape.dim:
        if not dimension.dim_param:
            yield Range.only(dimension.dim_value)
        elif dimension.dim_param in profile:
            yield profile[dimension.dim_param]
        else:
            raise BundleError(
                f'input "{value.name}" has a dimension "{dimension.dim_param}", and the profile gives '
                f"{', '.join(profile)}: export the bundle again"
            )
