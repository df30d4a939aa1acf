"""An image's tiles, ready for the vision network, in whatever memory they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Pixels(Protocol):
    """The tiles of one image; ``len`` gives their number."""

    @property
    def name(self) -> str:
        """Pixels of equal names have equal embeddings: the key by which caches know an image."""

    def __len__(self) -> int: ...

    def embeds(self) -> npt.NDArray[Any]:
        """Computes [tiles · tokens_per_tile, hidden] in the bundle's number format."""


class HostPixels:
    """Tiles in host memory.

    Args:
        values: float32 [tiles, 3, size, size].
        encode: computes their embeddings, as ``Backend.encode_image`` does.
    """

    def __init__(
        self, values: npt.NDArray[np.float32], encode: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
    ) -> None:
        self.values, self._encode = values, encode

    @cached_property
    def name(self) -> str:
        """SHA-256 of the values, in hexadecimal."""
        return hashlib.sha256(np.ascontiguousarray(self.values).data.cast("B")).hexdigest()

    def __len__(self) -> int:
        return len(self.values)

    def embeds(self) -> npt.NDArray[Any]:
        """Computes [tiles · tokens_per_tile, hidden] in the bundle's number format."""
        return self._encode(self.values)
