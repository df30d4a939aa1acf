"""What is tried on a GPU, each in a process of its own: copies, a kernel of the plugin library."""

from __future__ import annotations

import ctypes
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.backends.cuda.device import Device
    from runtime.backends.tensorrt.pixels import Resize
    from runtime.images.preprocess import ImageProcessor

COPIED = 256 << 20
"""Bytes of one copy, where the GPU has room: more than its cache holds."""

COPIES = 20


def bandwidth() -> float:
    """Measures copies within the GPU's memory, through the driver alone; returns bytes read and written a second."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    source, target = ctypes.c_uint64(), ctypes.c_uint64()

    def call(name: str, *arguments: object) -> None:
        if status := getattr(driver, name)(*arguments):
            text = ctypes.c_char_p()
            driver.cuGetErrorName(status, ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'').decode(errors='replace')} ({status})")

    def copies(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            call("cuMemcpyDtoDAsync_v2", target, source, size, None)
        call("cuCtxSynchronize")
        return time.perf_counter() - begin

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(handle), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    call("cuCtxPushCurrent_v2", context)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    size = ctypes.c_size_t(min(COPIED, free.value // 4))
    for memory in (source, target):
        call("cuMemAlloc_v2", ctypes.byref(memory), size)
    copies(2)
    seconds = copies(COPIES)
    for memory in (source, target):
        call("cuMemFree_v2", memory)
    return 2 * COPIES * size.value / seconds


def resize(device: Device | None = None, kernel: Resize | None = None) -> int:
    """Cuts a picture of noise into tiles with the plugin library's kernel, and compares them with Pillow's, bit by bit.

    The way is that of the backend: PyCUDA, a stream, page-locked memory, copies, the kernel.

    Args:
        device: instead of PyCUDA's.
        kernel: instead of the plugin library's.

    Returns:
        How many numbers were compared.

    Raises:
        BackendError: the library or the GPU fails, or a number differs.
    """
    import numpy as np
    from PIL import Image

    from runtime.errors import BackendError
    from runtime.images.preprocess import ImageProcessor

    processor = ImageProcessor(56, 4, 1, 4, True, True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    picture = np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8)
    expected = processor.cut(Image.fromarray(picture))
    got = _tiles(picture, processor, expected, device, kernel)
    if wrong := int((got != expected).sum()):
        raise BackendError(f"{wrong:,} of {expected.size:,} numbers differ from Pillow's: build the library again")
    return int(expected.size)


def _tiles(
    picture: NDArray[np.uint8],
    processor: ImageProcessor,
    expected: NDArray[np.float32],
    device: Device | None,
    kernel: Resize | None,
) -> NDArray[np.float32]:
    """Makes the tiles of a picture on the GPU, as many and as large as those that are expected."""
    from runtime.backends.tensorrt.pixels import Tiler, open_resize
    from runtime.backends.tensorrt.plan import Buffer, Profile, VisionLayout

    if device is None:
        from runtime.backends.cuda.pycuda import PyCudaDevice

        device = PyCudaDevice()
    tile = Buffer(expected.dtype, expected.shape[1:])
    layout = VisionLayout((Profile(0, 1, 1),), tile, tile)
    with device:
        memory, host = device.allocate(picture.nbytes), device.allocate_host(max(picture.nbytes, expected.nbytes))
        host.array[: picture.nbytes] = picture.reshape(-1)
        device.upload(host.array[: picture.nbytes], memory.address)
        described = {"data": (memory.address, False), "shape": picture.shape, "typestr": "|u1", "version": 3}
        frame = SimpleNamespace(__cuda_array_interface__=described)
        pixels = Tiler(device, layout, kernel or open_resize(), lambda pixels: expected)(frame, processor, None)
        device.download(pixels.address, host.array[: expected.nbytes])
        done = device.event()
        done.record()
        done.wait()
        tiles = host.array[: expected.nbytes].view(expected.dtype).reshape(expected.shape).copy()
        for resource in (done, memory, host):
            resource.free()
    return tiles
