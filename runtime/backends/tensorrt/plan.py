"""The tensors of a TensorRT plan, and how it is called: profiles, chunks, buffers.

Nothing here needs TensorRT or a GPU. ``PlanInfo`` is plain data, made from an engine on a device and from a network and
its profiles in tests; ``runtime.backends.tensorrt.check`` makes layouts from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from runtime.backends import graph
from runtime.bundle.manifest import PRECISIONS

Shape = tuple[int, ...]

ALIGNMENT = 256
"""Tensors begin at multiples of this many bytes, as TensorRT requires."""

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
"""TensorRT's names of the bundle's number formats."""

NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    **{TYPES[precision]: dtype for precision, dtype in PRECISIONS.items()},
    "INT64": np.dtype("<i8"),
    "BOOL": np.dtype(np.bool_),
}
"""How numpy holds TensorRT's number formats."""


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, tuned and largest shape of an input in one profile."""

    minimum: Shape
    optimum: Shape
    maximum: Shape


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a plan.

    Attributes:
        name: in the graph.
        is_input: rather than output.
        type: TensorRT's name of its number format, as ``BF16``.
        shape: sizes; -1 where profiles decide.
        ranges: of an input, in each profile.
        alias: of an output, the input that it must share memory with, if any.
        on_host: TensorRT wants it in host memory.
    """

    name: str
    is_input: bool
    type: str
    shape: Shape
    ranges: tuple[ShapeRange, ...] = ()
    alias: str | None = None
    on_host: bool = False


@dataclass(frozen=True)
class PlanInfo:
    """A plan: its tensors, and how many bytes activations take at most."""

    tensors: tuple[TensorInfo, ...]
    scratch: int


@dataclass(frozen=True)
class Buffer:
    """Memory for one tensor, as numpy holds it."""

    dtype: np.dtype[Any]
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Profile:
    """An optimization profile, by how many rows (tokens, or tiles) it takes at once."""

    index: int
    minimum: int
    maximum: int


@dataclass(frozen=True)
class _Layout:
    """How a plan is called: which profile takes how many rows."""

    profiles: tuple[Profile, ...]

    @property
    def chunk(self) -> int:
        """Rows (tokens, or tiles) that a call takes at most."""
        return self.profiles[-1].maximum

    def profile(self, rows: int) -> Profile:
        """Returns the profile for a call with so many rows, 1 to ``chunk``: the one for the fewest that will do."""
        return next(profile for profile in self.profiles if profile.minimum <= rows <= profile.maximum)


@dataclass(frozen=True)
class DecoderLayout(_Layout):
    """How a decoder plan is called, with one sequence in a call.

    Attributes:
        profiles: fewest tokens first.
        capacity: tokens that the caches hold.
        hidden: [1, tokens, hidden] is the shape of ``inputs_embeds``, whose number format is that of the caches.
        cache: memory of one cache, [1, kv_heads, capacity, head_dim].
        caches: input and output of each cache.
        updates: the outputs are a call's own keys and values, [1, kv_heads, tokens, head_dim], and the caller writes
            them into the caches. Otherwise an output is the whole cache and shares the input's memory.
        logits: [1, vocab] in float32.
    """

    capacity: int
    hidden: int
    cache: Buffer
    caches: tuple[tuple[str, str], ...]
    updates: bool
    logits: Buffer

    def inputs(self, tokens: int) -> dict[str, Buffer]:
        """Returns all inputs but the caches. The embeddings come last, so a shorter call leaves out the end."""
        return {
            graph.WRITE_INDICES: Buffer(NUMPY_TYPES["INT64"], (1,)),
            graph.POSITION_IDS: Buffer(NUMPY_TYPES["INT64"], (1, tokens)),
            graph.VISUAL_MASK: Buffer(NUMPY_TYPES["BOOL"], (1, tokens)),
            graph.INPUTS_EMBEDS: Buffer(self.cache.dtype, (1, tokens, self.hidden)),
        }

    def update(self, tokens: int) -> Buffer:
        """Returns the update of one cache by a call, where a call gives updates."""
        _, heads, _, head_dim = self.cache.shape
        return Buffer(self.cache.dtype, (1, heads, tokens, head_dim))

    def shapes(self, tokens: int) -> dict[str, Shape]:
        """Returns the shapes of all inputs of a call with so many tokens."""
        shapes = {name: buffer.shape for name, buffer in self.inputs(tokens).items()}
        return shapes | {past: self.cache.shape for past, _ in self.caches}


@dataclass(frozen=True)
class VisionLayout(_Layout):
    """How a vision plan is called: tiles in, visual tokens out.

    Attributes:
        profiles: fewest tiles first.
        tile: one tile's pixels, [3, size, size].
        tokens: one tile's visual tokens, [tokens_per_tile, hidden].
    """

    tile: Buffer
    tokens: Buffer


def place(buffers: dict[str, Buffer]) -> tuple[dict[str, int], int]:
    """Returns where each tensor begins in one block of memory, and the size of the block, in bytes."""
    offsets, size = {}, 0
    for name, buffer in buffers.items():
        offsets[name] = size
        size += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size
