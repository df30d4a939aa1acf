"""Prefill and decode over one sequence's caches, reusing what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Backend, Context
from runtime.conversation import Prompt, common_prefix

GROWTH = 256
"""Caches grow by multiples of this many tokens."""

Embed = Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]


def round_up(tokens: int, limit: int) -> int:
    """Returns a capacity for ``tokens``, at most ``limit``."""
    return min(-(-tokens // GROWTH) * GROWTH, limit)


class Sequence:
    """One sequence of tokens and the caches that hold it.

    Args:
        backend: what computes.
        embed: token ids [n] → embeddings [n, hidden] in the bundle's number format.
    """

    def __init__(self, backend: Backend, embed: Embed) -> None:
        self._backend, self._embed = backend, embed
        self._context: Context = backend.new_context()
        self._keys = np.empty(0, np.int64)
        self._length = 0

    def reusable(self, prompt: Prompt) -> int:
        """Returns how many leading tokens of a prompt need not be computed again; the last one always is."""
        return min(common_prefix(self._keys[: self._length], prompt.keys), len(prompt) - 1)

    def prefill(self, prompt: Prompt, cancelled: Callable[[], bool]) -> npt.NDArray[np.float32] | None:
        """Computes what the caches do not hold of a prompt.

        Returns:
            Logits of the last position, [vocab]; None when ``cancelled`` became true between two chunks.
        """
        start = self._length = self.reusable(prompt)
        self._reserve(len(prompt))
        self._keys[start : len(prompt)] = prompt.keys[start:]
        visual = _VisualEmbeds(prompt)
        logits: npt.NDArray[np.float32] | None = None
        while start < len(prompt):
            if cancelled():
                return None
            stop = min(start + self._backend.chunk, len(prompt))
            mask = prompt.visual_mask[start:stop]
            embeds = self._embed(prompt.ids[start:stop])
            if mask.any():
                embeds[mask] = visual.between(start, stop)
            logits = self._context.forward(embeds, mask, start)
            start = self._length = stop
        return logits

    def step(self, token_id: int) -> npt.NDArray[np.float32]:
        """Appends one text token; returns the logits after it, [vocab]."""
        self._reserve(self._length + 1)
        self._keys[self._length] = token_id
        embeds = self._embed(np.array([token_id]))
        logits = self._context.forward(embeds, np.zeros(1, np.bool_), self._length)
        assert logits is not None  # noqa: S101 - of a text token
        self._length += 1
        return logits

    def truncate(self, tokens: int) -> None:
        """Forgets what the caches hold beyond this many tokens."""
        self._length = min(self._length, tokens)

    def _reserve(self, tokens: int) -> None:
        # Each by itself, since an interrupt may come between.
        capacity = round_up(tokens, self._backend.max_length)
        if tokens > self._context.capacity:
            self._context.reserve(capacity)
        if tokens > len(self._keys):
            self._keys = np.concatenate([self._keys, np.empty(capacity - len(self._keys), np.int64)])


class _VisualEmbeds:
    """The embeddings of a prompt's images, each computed when its first token is reached."""

    def __init__(self, prompt: Prompt) -> None:
        self._images, self._positions = prompt.images, np.flatnonzero(prompt.visual_mask)
        tiles = list(map(len, prompt.images))
        per_tile = len(self._positions) // max(1, sum(tiles))
        # Bounds of each image among the visual tokens.
        self._bounds = np.cumsum([0, *(count * per_tile for count in tiles)])
        self._current: tuple[int, npt.NDArray[Any]] | None = None

    def between(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Returns embeddings of the visual tokens at prompt positions ``start`` … ``stop``, [n, hidden]."""
        first, last = np.searchsorted(self._positions, [start, stop])
        parts = []
        for index, (begin, end) in enumerate(zip(self._bounds[:-1], self._bounds[1:], strict=True)):
            if begin < last and end > first:
                parts.append(self._image(index)[max(first, begin) - begin : min(last, end) - begin])
        return np.concatenate(parts)

    def _image(self, index: int) -> npt.NDArray[Any]:
        # Chunks go forward, so only the image at hand is kept.
        if self._current is None or self._current[0] != index:
            self._current = (index, self._images[index].embeds())
        return self._current[1]
