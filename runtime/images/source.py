"""What may be given as an image, and where its pixels come from: a file, bytes, a picture of Pillow or an array."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import ImageError

T = TypeVar("T")


class ArrayLike(Protocol):
    """What numpy makes an array of, as torch's tensors on the CPU are."""

    def __array__(self) -> NDArray[Any]: ...


ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any] | ArrayLike
)
"""What ``load_image`` takes."""

_BASE64 = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
"""How PNG, JPEG, WebP and GIF begin in base64."""


def image_file(path: str | os.PathLike[str], beside: Path | None = None) -> Path:
    """Returns the path of a file that can be read, with ``~`` replaced; devices and pipes are not opened.

    Args:
        path: as it was given.
        beside: the folder that a relative path starts from, instead of the current one.

    Raises:
        ImageError: there is no such file, or it is unreadable.
    """
    text = os.fsdecode(path)
    name, hint = short(f"{beside}/{text}" if beside else text), "check it"
    if text.startswith(_BASE64):
        hint = "base64 is given as data:image/png;base64,…, or decoded"
    elif "://" in text:
        hint = "give the bytes of what a URL names"
    try:
        file = Path(beside or "", Path(text).expanduser())
        if stat.S_ISREG(file.stat().st_mode):
            file.open("rb").close()
            return file
        problem = "is not a file"
    except (FileNotFoundError, NotADirectoryError):
        problem = "does not exist"
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: NUL, surrogates; RuntimeError: no such ~user
        problem = f"cannot be read ({getattr(error, 'strerror', None) or reason_of(error)})"
    raise ImageError(f"expected the path of an image file, but {name} {problem}: {hint}") from None


def short(value: object) -> str:
    """Returns a value's ``repr``, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:100]}…{text[-20:]}"


def source_of(image: Any) -> tuple[Path | bytes | Image.Image | NDArray[Any], str]:  # noqa: ANN401 - checked here
    """Returns where an image's pixels come from, and its name for messages.

    Raises:
        ImageError: nothing that is an image, or what cannot be read.
    """
    kind = f"{type(image).__module__}.{type(image).__qualname__}"
    if isinstance(image, Image.Image):
        return image, "the PIL image"
    if isinstance(image, str) and image[:5].lower() == "data:":
        return _read(lambda: _from_data_uri(image), short(image)), "the image of the data URI"
    if isinstance(image, (str, os.PathLike)):
        file = image_file(image)
        return file, short(str(file))
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = _read(lambda: bytes(image), f"the {kind}")
        return data, f"the {len(data)} bytes given"
    if hasattr(image, "read"):
        return _read(lambda: _from_file_object(image), f"the {kind}"), f"the image of the {kind}"
    if hasattr(image, "__array__"):
        return _from_array(image, kind), "the array"
    raise ImageError(
        "expected an image as a path, the bytes of a file, a binary file object, a data URI, a PIL image or an array "
        f"[height, width, 3], got {kind}: convert it to one of these"
    )


def _read(read: Callable[[], T], name: str) -> T:
    try:
        return read()
    except Exception as error:  # what classes of anybody's raise: closed files, torch's gradients, bad base64
        raise ImageError(f"{name} cannot be read ({reason_of(error)}): give the image another way") from error


def _from_data_uri(text: str) -> bytes:
    head, _, body = text.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError("expected data:image/png;base64,…")
    data = b"".join(unquote_to_bytes(body).split())
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


def _from_file_object(file: Any) -> bytes:  # noqa: ANN401
    with suppress(AttributeError, OSError, ValueError):  # a pipe is read from where it stands
        file.seek(0)
    data = file.read()
    if not isinstance(data, bytes):
        raise TypeError(f"expected bytes, it gave a {type(data).__name__}: files are opened in mode 'rb'")
    return data


def _from_array(given: Any, kind: str) -> NDArray[Any]:  # noqa: ANN401
    if isinstance(given, np.ma.MaskedArray):
        raise ImageError("expected an array of pixels, got a masked array: fill it, as array.filled(255) does")
    array = _read(lambda: np.asarray(given), f"the {kind}")
    got = f"got {str(array.dtype)[:80]} {list(array.shape)}"
    if array.ndim != 2 and not (array.ndim == 3 and 1 <= array.shape[2] <= 4):
        fix = "give one image, its channels last"
        if array.ndim == 3 and 1 <= array.shape[0] <= 4:
            fix = "put the channels last with array.transpose(1, 2, 0), in torch tensor.permute(1, 2, 0)"
        raise ImageError(f"expected an array [height, width, 3], [height, width, 4] or [height, width], {got}: {fix}")
    if not array.size:
        raise ImageError(f"the array has no pixels: expected at least 1×1, {got}")
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def reason_of(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
