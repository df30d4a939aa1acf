"""Names of the inputs and outputs of a bundle's graphs; ``export.model.trace`` gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

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
