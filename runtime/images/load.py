"""Reads images: from paths, bytes, Pillow's images and arrays, as RGB.

Pixels are taken as they are stored: like the official code, nothing here turns an image by its EXIF orientation.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from runtime.errors import ImageError

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""What ``load_image`` takes."""


def load_image(image: ImageInput) -> Image.Image:
    """Reads an image as RGB.

    Args:
        image: a path; the bytes of an image file; a PIL image of any mode; or a uint8 array, [height, width, 3] in RGB
            order, [height, width, 4] RGBA, or [height, width] gray. All go through Pillow's ``convert("RGB")``, as in
            the official code: alpha is dropped, not blended, and 16-bit gray is clipped at 255, not scaled. Of an
            animation the first frame is read.

    Raises:
        ImageError: no such file, not an image, a damaged one, an array of another type or shape, no pixels, or so many
            that Pillow takes it for a decompression bomb.
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
