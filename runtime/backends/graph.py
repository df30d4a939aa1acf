"""Names of the inputs and outputs of a bundle's graphs; ``export.model.trace`` gives them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy.typing as npt

from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, weights_of
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError

S = TypeVar("S", bound=Any)

PIXEL_VALUES, VISUAL_EMBEDS = "pixel_values", "visual_embeds"
INPUTS_EMBEDS, VISUAL_MASK = "inputs_embeds", "visual_mask"
POSITION_IDS, WRITE_INDICES = "position_ids", "write_indices"
LOGITS = "logits"
PAST, PRESENT, UPDATE = "past_key_values.", "present.", "update."
"""Prefixes of the caches' names as inputs and as outputs; ``0.key``, ``0.value``, ``1.key``, … follow.

A cache is [batch, kv_heads, capacity, head_dim]. A decoder has one of two kinds of outputs. ``present.*`` are the
caches with the chunk in them, and may be the same memory as the past. ``update.*``, [batch, kv_heads, sequence,
head_dim], are the chunk's own keys and values; the caller writes them into the caches from ``write_indices`` on, along
axis 2, before the next call.
"""

Observer = Callable[[Mapping[str, npt.NDArray[Any]], Mapping[str, npt.NDArray[Any]]], object]
"""Called after each run of a decoder, with arrays that the next run changes: copy what is kept.

The first are the inputs by name, the caches among them, which hold the run's own keys and values by then. The second
are those outputs by name that are neither logits nor caches: a bundle's graphs have none.
"""


@dataclass(frozen=True)
class GraphInMemory:
    """A graph that runs in place of one of a bundle's.

    Attributes:
        model: the graph, serialized. Its external data lies in the bundle's files.
        weights: initializers that are taken from here instead, by name. They are computed with as they lie here.
    """

    model: bytes
    weights: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def cache_names(layers: int) -> list[str]:
    """Returns what follows the prefixes, in graph order."""
    return [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def check_graph(bundle: Bundle, graph: str, session: S) -> S:
    """Checks that a graph that was opened is the bundle's, and has the sizes that the manifest says.

    Args:
        bundle: as it was opened.
        graph: the graph's name.
        session: the graph, as an ``onnxruntime.InferenceSession``.

    Returns:
        The session.

    Raises:
        BundleError: the graph or its weights were replaced meanwhile, or a fact of the manifest is not the graph's.
    """
    bundle.require_same(graph, weights_of(graph))
    model, image = bundle.manifest.model, bundle.manifest.image
    shapes = {item.name: item.shape for item in (*session.get_inputs(), *session.get_outputs())}
    caches = [name for name in shapes if name.startswith(PAST)]
    sizes: dict[str, dict[int, int]] = {
        **{name: {1: model.num_key_value_heads, 3: model.head_dim} for name in caches},
        INPUTS_EMBEDS: {2: model.hidden_size},
        LOGITS: {1: model.vocab_size},
        PIXEL_VALUES: {2: image.image_size, 3: image.image_size},
        VISUAL_EMBEDS: {1: image.tokens_per_tile, 2: model.hidden_size},
    }
    if graph == DECODER_GRAPH and len(caches) != 2 * model.num_hidden_layers:
        raise BundleError(_differs(bundle, graph, f"has {len(caches)} caches", 2 * model.num_hidden_layers))
    for name, expected in sizes.items():
        for axis, size in expected.items():
            if name in shapes and shapes[name][axis : axis + 1] != [size]:
                raise BundleError(_differs(bundle, graph, f"has {name} of {shapes[name]}", f"{size} at place {axis}"))
    return session


def link_advice(bundle: Bundle, graph: str) -> str:
    """Returns what to do about a link that ONNX Runtime does not follow: out of the folder of the graph's own file."""
    file, weights = bundle.path(graph), bundle.path(weights_of(graph))
    real = weights.resolve()
    if real.parent in (file.parent.resolve(), file.resolve().parent):
        return ""
    copy = shlex.join(["cp", "--remove-destination", str(real), str(weights)])
    return f", which does not follow the link {weights} out of its folder; put a copy there ({copy})"


def _differs(bundle: Bundle, graph: str, got: str, expected: object) -> str:
    return f"{bundle.path(graph)} {got}, {MANIFEST} says {expected}: export the bundle again"
