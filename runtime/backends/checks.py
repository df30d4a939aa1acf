"""Checks that a graph that ONNX Runtime has opened is the one that the bundle's manifest tells of."""

from __future__ import annotations

import shlex
from typing import Any, TypeVar

from runtime.backends.graph import INPUTS_EMBEDS, LOGITS, PAST, PIXEL_VALUES, VISUAL_EMBEDS
from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, weights_of
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError

S = TypeVar("S", bound=Any)


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
