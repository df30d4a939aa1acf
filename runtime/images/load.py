"""Reads images: from paths, bytes, file objects, data URIs, Pillow's images and arrays, as RGB."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.errors import ImageError
from runtime.images.shown import eight_bits, shown
from runtime.images.source import ImageInput, reason_of, source_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
"""Files that are read. Pillow reads more, some by starting another program."""

MAX_PIXELS = 178_956_970
"""Pixels of an image at most. Pillow takes a file of more for a decompression bomb."""


def load_image(image: ImageInput, *, as_stored: bool = False, max_pixels: int | None = None) -> Image.Image:
    """Reads an image as RGB.

    Args:
        image: a path; the bytes of an image file; a binary file object, which is read from its start; a data URI; a PIL
            image of any mode; or an array, [height, width, 3] in RGB order (OpenCV's are BGR:
            ``cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)``), [height, width, 4] RGBA, [height, width] or [height, width, 1]
            gray, or [height, width, 2] gray and alpha. Its values are what ``eight_bits`` takes. Of an animation the
            first frame is read.
        as_stored: the pixels of the official code, ``Image.open(…).convert("RGB")``, instead of what viewers show.
        max_pixels: width × height at most, refused before anything is decoded; None for ``MAX_PIXELS``.

    Raises:
        ImageError: no such file, an unreadable one, not an image, a damaged one, an array of another type or shape, no
            pixels, or too many.
    """
    return OpenedImage(image, as_stored=as_stored, max_pixels=max_pixels).rgb


class OpenedImage:
    """An image of which the size is known. Its pixels are computed when they are asked for, and then kept.

    Takes what ``load_image`` takes, and raises what it raises.

    Attributes:
        size: (width, height) as stored; one that lies on its side is seen as (height, width).
    """

    def __init__(self, image: ImageInput, *, as_stored: bool = False, max_pixels: int | None = None) -> None:
        self._source, self._name = source_of(image)
        self._as_stored = as_stored
        self._max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
        if isinstance(self._source, np.ndarray):
            self.size: tuple[int, int] = self._source.shape[1], self._source.shape[0]
            self._check(self.size)
            return
        with self._opened() as picture:
            self.size = picture.size

    @cached_property
    def rgb(self) -> Image.Image:
        """The pixels; nothing in their ``info`` asks to turn or blend them once more."""
        with self._opened() as picture:
            rgb = picture.convert("RGB") if self._as_stored else shown(picture)
        rgb.info.clear()
        return rgb

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        """Opens the image, and turns what Pillow says of it into one line."""
        source, name = self._source, self._name
        try:
            if isinstance(source, np.ndarray):
                yield Image.fromarray(np.ascontiguousarray(source if self._as_stored else eight_bits(source)))
            elif isinstance(source, Image.Image):
                self._check(source.size)
                yield source
            else:
                file = io.BytesIO(source) if isinstance(source, bytes) else source
                with Image.open(file, formats=FORMATS) as picture:
                    self._check(picture.size)
                    yield picture
        except (MemoryError, ImageError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(f"{name} is too large to decode safely: shrink it first ({error})") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} is not an image of {', '.join(FORMATS)}: save it as PNG or JPEG") from error
        except Exception as error:  # Pillow's decoders raise a dozen types for damaged files
            raise ImageError(f"{name} cannot be decoded ({reason_of(error)}): check that it is complete") from error

    def _check(self, size: tuple[int, int]) -> None:
        width, height = size
        if 0 in size:
            raise ImageError(f"{self._name} has no pixels: expected at least 1×1, got {width}×{height}")
        if width * height > self._max_pixels:
            most = f"more than the {self._max_pixels} allowed (max_pixels)"
            raise ImageError(f"{self._name} has {width}×{height} pixels, {most}: shrink it first")
