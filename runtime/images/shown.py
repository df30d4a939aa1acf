"""Pixels as people see them: what any viewer does with a file before it shows it.

A picture is turned by its EXIF orientation, laid over white where it is transparent, and scaled to 8 bits. The official
code does none of it: it drops alpha, and clips what is above 255.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import ImageError

_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
"""Tags of TIFF, and so of EXIF."""

_WHITE_IS_ZERO = 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


def shown(picture: Image.Image) -> Image.Image:
    """Returns a picture as viewers show it, in RGB.

    Raises:
        ImageError: as ``eight_bits`` does, for the modes of more than 8 bits.
    """
    picture.load()  # Pillow turns a TIFF here.
    turn = _turn(picture)
    if picture.mode.startswith(("I", "F")):
        values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
        gray = eight_bits(values << 4 if tags.get(_BITS_PER_SAMPLE) == (12,) else values)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = 255 - gray
        if "transparency" in picture.info:
            gray[values == picture.info["transparency"]] = 255
        picture = Image.fromarray(gray)
    rgb = _over_white(picture) if picture.has_transparency_data else picture.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Returns values of any scale that says where black and white lie, as 0 … 255.

    Args:
        values: uint8; uint16, whose white is 65,535; floating point from 0 to 1; or bool.

    Raises:
        ImageError: values of another type, whose scale nobody can know, or floats that are not all within 0 … 1.
    """
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    got = f"got {str(values.dtype)[:80]} {list(values.shape)}"
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ImageError(f"expected floats from 0 to 1, {got} from {low:g} to {high:g}: scale them")
        return np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    raise ImageError(
        f"expected uint8 of 0 … 255, uint16 of 0 … 65535 or floats of 0 … 1, {got}: scale it to one of them, as "
        ".astype(numpy.uint8) does where the values are 0 … 255"
    )


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None


def _over_white(picture: Image.Image) -> Image.Image:
    """Lays a picture over white, as vLLM does."""
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white
