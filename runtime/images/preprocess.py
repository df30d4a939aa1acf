"""Images to tiles: what the vision network reads, with the bits of the official code.

The rule is InternVL's dynamic tiling as Mono-InternVL publishes it (``dynamic_preprocess``, then torchvision's ToTensor
and Normalize). Of the grids of min_tiles … max_tiles square tiles, the one is taken whose aspect ratio is closest to
the image's. The image is stretched over it with Pillow's bicubic filter and cut up. Where that gives more than one
tile, the whole image follows as a thumbnail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import BundleError, OptionError
from runtime.images.load import load_image
from runtime.images.source import ImageInput

MAX_TILES = 1000
"""Most tiles of a grid. So many are a quarter of a million visual tokens, beyond what any checkpoint can read."""


@dataclass(frozen=True)
class ImageProcessor:
    """How one checkpoint takes its images, as its bundle's manifest says.

    Attributes:
        image_size: side of a tile in pixels.
        tokens_per_tile: visual tokens that the network makes of a tile.
        min_tiles: fewest tiles of a grid.
        max_tiles: most tiles of a grid, the thumbnail not counted.
        use_thumbnail: whether the whole image follows when the grid has more than one tile.
        dynamic_image_size: False for a checkpoint that takes every image as exactly one tile.
        mean: what is subtracted from red, green and blue, after scaling to 0 … 1.
        std: what each of them is then divided by.

    Raises:
        BundleError: a value of the wrong type or out of range.
    """

    image_size: int
    tokens_per_tile: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    dynamic_image_size: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("image_size", "tokens_per_tile", "min_tiles", "max_tiles"):
            self._require(name, _is_count(getattr(self, name)), "a whole number of at least 1")
        for name in ("use_thumbnail", "dynamic_image_size"):
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        for name in ("mean", "std"):
            self._require(name, _are_channels(getattr(self, name)), "three finite numbers")
        self._require("std", min(self.std) > 0, "three numbers above 0")
        self._require("min_tiles", self.min_tiles <= self.max_tiles, f"at most max_tiles={self.max_tiles}")
        self._require("max_tiles", self.max_tiles <= MAX_TILES, f"at most {MAX_TILES}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            got = f"got {getattr(self, name)!r}"
            raise BundleError(f"image processor: {name} must be {expected}, {got}: export the bundle again")

    def fewest_tiles(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """Counts the tiles of an image that may have to be turned before it is seen, as ``tiles`` does."""
        return min(self.tiles(width, height, max_tiles), self.tiles(height, width, max_tiles))

    def tiles(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """Counts the tiles, thumbnail included, of an image of width × height pixels; raises as a call does."""
        return sum(columns * rows for columns, rows in self.grids(width, height, max_tiles))

    def grids(self, width: int, height: int, max_tiles: int | None = None) -> list[tuple[int, int]]:
        """Returns the grids, as (columns, rows), that an image is stretched over: its own, then the thumbnail's if any.

        Raises:
            OptionError: as a call does.
        """
        least, most = self.min_tiles, self.max_tiles if max_tiles is None else max_tiles
        if not self.dynamic_image_size:
            if max_tiles is not None and not (_is_count(max_tiles) and max_tiles == 1):
                raise OptionError(f"max_tiles must be 1, got {max_tiles!r}: this checkpoint takes an image as one tile")
            least = most = 1
        grid = tile_grid(width, height, image_size=self.image_size, max_tiles=most, min_tiles=least)
        return [grid, (1, 1)] if self.use_thumbnail and grid != (1, 1) else [grid]

    def __call__(self, image: ImageInput, max_tiles: int | None = None) -> NDArray[np.float32]:
        """Reads an image as viewers show it, and cuts it: ``load_image``, then ``cut``."""
        return self.cut(load_image(image), max_tiles)

    def cut(self, picture: Image.Image, max_tiles: int | None = None) -> NDArray[np.float32]:
        """Computes what the vision network reads.

        Args:
            picture: RGB, as ``load_image`` returns it.
            max_tiles: overrides the checkpoint's.

        Returns:
            float32 [tiles, 3, image_size, image_size], C-contiguous: the grid row by row, then the thumbnail.

        Raises:
            OptionError: ``max_tiles`` is not a whole number from ``min_tiles`` to ``MAX_TILES``, or is not 1 where this
                checkpoint takes an image as exactly one tile.
        """
        size, parts = self.image_size, []
        for columns, rows in self.grids(*picture.size, max_tiles):
            grid = np.asarray(picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
            parts.append(grid.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3))
        tiles = np.concatenate(parts)
        # Looked up, so that no float copy of the image is made on the way.
        values = np.empty((len(tiles), 3, size, size), np.float32)
        for channel, normalized in enumerate(levels(self.mean, self.std)):
            values[:, channel] = normalized[tiles[..., channel]]
        return values


def tile_grid(width: int, height: int, *, image_size: int, max_tiles: int, min_tiles: int = 1) -> tuple[int, int]:
    """Chooses the grid, as (columns, rows), that an image of width × height pixels is stretched over.

    The closest aspect ratio wins. Among grids equally close, it is the largest of which the image has more than half
    the area, else the smallest. The order of equally large grids (fewest columns first) can only matter when
    ``min_tiles`` > 1, where the official code leaves it to the order of a Python set.

    Raises:
        OptionError: ``max_tiles`` is not a whole number from ``min_tiles`` to ``MAX_TILES``.
    """
    if not (_is_count(max_tiles) and max_tiles >= min_tiles):
        raise OptionError(f"max_tiles must be a whole number of at least {min_tiles}, got {max_tiles!r}")
    if max_tiles > MAX_TILES:
        raise OptionError(f"max_tiles must be at most {MAX_TILES}, got a larger number: nothing reads so many tokens")
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(-(-min_tiles // columns), max_tiles // columns + 1)
    ]
    grids.sort(key=math.prod)
    # In floating point on purpose: the official comparison is, and near ties come out as it rounds.
    distances = [abs(width / height - columns / rows) for columns, rows in grids]
    closest = min(distances)
    tied = [grid for grid, distance in zip(grids, distances, strict=True) if distance == closest]
    filled = [grid for grid in tied if width * height > 0.5 * image_size**2 * math.prod(grid)]
    return filled[-1] if filled else tied[0]


def levels(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Returns what each value of a byte becomes in each channel, float32 [3, 256].

    Computed operation by operation as torchvision does.
    """
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.stack([(scaled - np.float32(mean[channel])) / np.float32(std[channel]) for channel in range(3)])


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _are_channels(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and all(type(number) in (int, float) and math.isfinite(number) for number in value)
    )
