"""Pictures that lie in a GPU's memory already, as cameras and decoders leave them there.

They are recognized by ``__dlpack__`` (torch, CuPy, PyNvVideoCodec and others) or ``__cuda_array_interface__``
(jetson-utils, Numba, PyCUDA and others). They are uint8 [height, width, 3] in RGB order, or [height, width, 4] whose
fourth channel is dropped. Rows, pixels and channels may lie any number of bytes apart.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from runtime.errors import ImageError

_CUDA_DEVICES = (2, 13)
"""DLPack's numbers of CUDA's memory and of its managed memory."""

_REMEDY = "give one picture of one GPU as uint8 [height, width, 3], in RGB order"


@dataclass(frozen=True)
class DeviceFrame:
    """A picture in device memory.

    Attributes:
        address: of the first pixel's red.
        width: in pixels.
        height: in pixels.
        strides: bytes from one row, pixel and channel to the next.
        owner: what keeps the memory.
    """

    address: int
    width: int
    height: int
    strides: tuple[int, int, int]
    owner: object


class DevicePixels:
    """``Pixels`` in device memory, which the host never sees.

    Args:
        address: of [tiles, 3, size, size] in the bundle's number format.
        tiles: how many.
        name: of no other picture, even if it has equal pixels: they are not compared.
        encode: computes their embeddings, on the GPU that they are on.
    """

    def __init__(self, address: int, tiles: int, name: str, encode: Callable[[DevicePixels], npt.NDArray[Any]]) -> None:
        self.address, self.name = address, name
        self._tiles, self._encode = tiles, encode

    def __len__(self) -> int:
        return self._tiles

    def embeds(self) -> npt.NDArray[Any]:
        """Computes [tiles · tokens_per_tile, hidden] in the bundle's number format."""
        return self._encode(self)


class CudaArray(Protocol):
    """An array that describes its device memory by ``__cuda_array_interface__``."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class DLPackArray(Protocol):
    """An array that describes its memory by DLPack."""

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """Returns kind and number of the device."""

    def __dlpack__(self, *, stream: Any = None) -> Any:  # noqa: ANN401
        """Returns a capsule that holds the array's description."""


DeviceImage: TypeAlias = CudaArray | DLPackArray
"""An object that may be a picture in a GPU's memory."""


def is_device_frame(image: object) -> bool:
    """Returns whether an object says that it lies in a GPU's memory."""
    if hasattr(image, "__dlpack_device__"):
        try:
            return bool(image.__dlpack_device__()[0] in _CUDA_DEVICES)
        except Exception:
            return False
    return hasattr(image, "__cuda_array_interface__")


def frame_size(image: Any) -> tuple[int, int]:  # noqa: ANN401
    """Returns a picture's (width, height) before anything else of it is read; that of one pixel where it has none."""
    shape = getattr(image, "shape", None) or getattr(image, "__cuda_array_interface__", {}).get("shape", ())
    return (int(shape[1]), int(shape[0])) if len(shape) == 3 and 0 not in shape else (1, 1)


def device_frame(image: Any, stream: int, synchronize: Callable[[], None]) -> DeviceFrame:  # noqa: ANN401
    """Returns the picture that an object holds.

    Args:
        image: an object that ``is_device_frame`` is true for.
        stream: a CUDA stream; work enqueued on it later finds the picture finished.
        synchronize: waits for all work of the GPU; called unless the object says that there is nothing to
            wait for.

    Raises:
        ImageError: a picture of another type or shape, or on another GPU.
    """
    if hasattr(image, "__dlpack__"):
        return _from_dlpack(image, stream)
    interface = image.__cuda_array_interface__
    # Version 3 of the interface says by None that there is nothing to wait for; older ones say nothing.
    if interface.get("stream", 1) is not None:
        synchronize()
    kind, strides = interface["typestr"], interface.get("strides")
    return _frame(kind == "|u1", kind, interface["data"][0], tuple(interface["shape"]), strides, image)


def _from_dlpack(image: Any, stream: int) -> DeviceFrame:  # noqa: ANN401
    _, device = image.__dlpack_device__()
    if device:
        raise ImageError(f"expected a picture on GPU 0, got one on GPU {device}: {_REMEDY}")
    # Not renamed, so that it frees what it holds when it is dropped.
    capsule = image.__dlpack__(stream=stream)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    kind = (tensor.code, tensor.bits, tensor.lanes)
    address, shape = (tensor.data or 0) + tensor.byte_offset, tuple(tensor.shape[: tensor.ndim])
    strides = tensor.strides[: tensor.ndim] if tensor.strides else None
    return _frame(kind == (1, 8, 1), f"DLPack type {kind}", address, shape, strides, capsule)


class _DLTensor(ctypes.Structure):
    """The beginning of DLPack's ``DLManagedTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _frame(
    is_uint8: bool, kind: str, address: int, shape: tuple[int, ...], strides: Iterable[int] | None, owner: object
) -> DeviceFrame:
    """Checks what an array says of itself; without ``strides`` it is contiguous."""
    got = f"got {kind} {list(shape)} in a GPU's memory"
    if not is_uint8:
        raise ImageError(f"expected values of uint8, {got}: {_REMEDY}")
    if len(shape) != 3 or shape[2] not in (3, 4) or 0 in shape:
        raise ImageError(f"expected [height, width, 3] or [height, width, 4], {got}: {_REMEDY}")
    height, width, channels = shape
    row, pixel, channel = strides or (width * channels, channels, 1)
    return DeviceFrame(address, width, height, (row, pixel, channel), owner)
