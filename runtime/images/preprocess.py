"""Images to tiles: what the vision network reads, with the bits of the official code.

The rule is InternVL's dynamic tiling as Mono-InternVL publishes it (`dynamic_preprocess`, then torchvision's
ToTensor and Normalize): among the grids of min_tiles … max_tiles square tiles take the one whose aspect ratio
is closest to the image's, stretch the image over it with Pillow's bicubic filter, cut it up, and append the
whole image as a thumbnail when there is more than one tile.

Pixels are taken as they are stored: like the official code, nothing here turns an image by its EXIF
orientation.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from runtime.errors import BundleError, ImageError, OptionError
from runtime.records import read_record

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""What `load_image` takes."""


@dataclass(frozen=True)
class ImageProcessor:
    """How one checkpoint wants its images, as its bundle's manifest says.

    Attributes:
        image_size: side of a tile in pixels.
        tokens_per_tile: visual tokens that the network makes of a tile.
        min_tiles: fewest tiles a grid may have.
        max_tiles: most tiles a grid may have; the thumbnail comes on top.
        use_thumbnail: append the whole image when the grid has more than one tile.
        dynamic_image_size: False for a checkpoint that takes every image as exactly one tile.
        mean: what is taken from each of red, green and blue, after scaling to 0 … 1.
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

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            got = f"got {getattr(self, name)!r}"
            raise BundleError(f"image processor: {name} must be {expected}, {got}: export the bundle again")

    @classmethod
    def from_json(cls, data: object) -> ImageProcessor:
        """Read what `to_json` wrote.

        Raises:
            BundleError: not an object with exactly these keys, or a value out of range.
        """
        return read_record(cls, data, "image processor")

    def to_json(self) -> dict[str, object]:
        """Give these facts as an object of JSON types."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    def tiles(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """Count the tiles, with thumbnail, of an image of width × height pixels; raises as a call does."""
        return sum(columns * rows for columns, rows in self.grids(width, height, max_tiles))

    def grids(self, width: int, height: int, max_tiles: int | None = None) -> list[tuple[int, int]]:
        """Give the grids, as (columns, rows), that an image is stretched over: its own, then the thumbnail's if any."""
        least, most = self._limits(max_tiles)
        grid = tile_grid(width, height, image_size=self.image_size, max_tiles=most, min_tiles=least)
        return [grid, (1, 1)] if self.use_thumbnail and grid != (1, 1) else [grid]

    def __call__(self, image: ImageInput, max_tiles: int | None = None) -> NDArray[np.float32]:
        """Compute pixel_values [tiles, 3, image_size, image_size]; `max_tiles` overrides the checkpoint's.

        Raises:
            ImageError: see `load_image`.
            OptionError: max_tiles is not a whole number from min_tiles up, or is not 1 where this checkpoint
                takes exactly one tile.
        """
        least, most = self._limits(max_tiles)
        return pixel_values(
            image,
            image_size=self.image_size,
            max_tiles=most,
            min_tiles=least,
            use_thumbnail=self.use_thumbnail,
            mean=self.mean,
            std=self.std,
        )

    def _limits(self, max_tiles: int | None) -> tuple[int, int]:
        if self.dynamic_image_size:
            return self.min_tiles, self.max_tiles if max_tiles is None else max_tiles
        if max_tiles is not None and not (_is_count(max_tiles) and max_tiles == 1):
            raise OptionError(
                f"max_tiles must be 1, got {max_tiles!r}: this checkpoint takes an image as exactly one tile"
            )
        return 1, 1


def load_image(image: ImageInput) -> Image.Image:
    """Read an image as RGB.

    Args:
        image: a path; the bytes of an image file; a PIL image of any mode; or a uint8 array,
            [height, width, 3] in RGB order, [height, width, 4] RGBA, or [height, width] gray. All go through
            Pillow's `convert("RGB")`, as in the official code: alpha is dropped, not blended, and 16-bit gray
            is clipped at 255, not scaled. Of an animation the first frame is read.

    Raises:
        ImageError: no such file, not an image, a damaged one, an array of another type or shape, no pixels,
            or so many that Pillow takes it for a decompression bomb.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _decoded(image, "the PIL image")
    if isinstance(image, bytes):
        return _decoded(io.BytesIO(image), f"the {len(image)} bytes given")
    if isinstance(image, (str, os.PathLike)):
        path = Path(os.fsdecode(image))
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise ImageError(f"expected the path of an image file, but {str(image)!r} {what}: check it")
        return _decoded(path, repr(str(path)))
    raise ImageError(
        "expected an image as a path, the bytes of a file, a PIL image or a uint8 array [height, width, 3], "
        f"got {type(image).__module__}.{type(image).__qualname__}: convert it to one of these"
    )


def tile_grid(width: int, height: int, *, image_size: int, max_tiles: int, min_tiles: int = 1) -> tuple[int, int]:
    """Choose the grid, as (columns, rows), that an image of width × height pixels is stretched over.

    The closest aspect ratio wins. Among grids equally close, it is the largest of which the image has more
    than half the area, else the smallest. The order of equally large grids (fewest columns first) can only
    matter when min_tiles > 1, where the official code leaves it to the order of a Python set.

    Raises:
        OptionError: max_tiles is not a whole number of at least min_tiles.
    """
    if not (_is_count(max_tiles) and max_tiles >= min_tiles):
        raise OptionError(f"max_tiles must be a whole number of at least {min_tiles}, got {max_tiles!r}")
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


def pixel_values(
    image: ImageInput,
    *,
    image_size: int,
    max_tiles: int,
    min_tiles: int = 1,
    use_thumbnail: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """Compute what the vision network reads; `ImageProcessor` says what the arguments mean.

    With max_tiles=1 the whole image becomes one tile.

    Returns:
        float32 [tiles, 3, image_size, image_size], C-contiguous: the grid row by row, then the thumbnail.

    Raises:
        ImageError: see `load_image`.
        OptionError: see `tile_grid`.
    """
    picture = load_image(image)
    size = image_size
    columns, rows = tile_grid(*picture.size, image_size=size, max_tiles=max_tiles, min_tiles=min_tiles)
    grid = np.asarray(picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    tiles = grid.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if use_thumbnail and len(tiles) > 1:
        thumbnail = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, thumbnail[None]])

    # Looked up, so that no float copy of the image is made on the way.
    values = np.empty((len(tiles), 3, size, size), np.float32)
    for channel, normalized in enumerate(levels(mean, std)):
        values[:, channel] = normalized[tiles[..., channel]]
    return values


def levels(mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """What each value of a byte becomes in each channel, [3, 256].

    Computed in float32, operation by operation as torchvision does.
    """
    scaled = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.stack([(scaled - np.float32(mean[channel])) / np.float32(std[channel]) for channel in range(3)])


def pixel_digest(values: NDArray[np.float32]) -> str:
    """Name an image by what the network sees of it: sha256, in hex, of its pixel_values' bytes.

    Images with one digest give the same visual tokens, so this is a key for caches.
    """
    return hashlib.sha256(np.ascontiguousarray(values).data.cast("B")).hexdigest()


def _decoded(source: Path | io.BytesIO | Image.Image, name: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            picture = source.convert("RGB")
        else:
            with Image.open(source) as opened:
                picture = opened.convert("RGB")
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large to decode safely: shrink it first ({error})") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read: save it as PNG or JPEG") from error
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be decoded ({reason}): check that it is complete") from error
    if 0 in picture.size:
        raise ImageError(f"{name} has no pixels: expected at least 1×1, got {picture.width}×{picture.height}")
    return picture


def _from_array(array: NDArray[Any]) -> Image.Image:
    got = f"got {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise ImageError(
            f"expected a uint8 array of values 0 … 255, {got}: scale it to them, then .astype(numpy.uint8)"
        )
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        fix = "give one image, its channels last"
        if array.ndim == 3 and array.shape[0] in (3, 4):
            fix = "put the channels last with array.transpose(1, 2, 0)"
        raise ImageError(f"expected an array [height, width, 3], [height, width, 4] or [height, width], {got}: {fix}")
    if not array.size:
        raise ImageError(f"the array has no pixels: expected at least 1×1, {got}")
    return _decoded(Image.fromarray(np.ascontiguousarray(array)), "the array")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_channels(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and all(type(number) in (int, float) and math.isfinite(number) for number in value)
    )
