"""Makes tiles from pictures in device memory, with a kernel of the plugin library."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.cuda.device import Device, Resource, released_on_failure
from runtime.backends.plugin_library import BUILD_COMMAND, plugin_library
from runtime.backends.tensorrt.plan import Buffer, VisionLayout, place
from runtime.bundle.manifest import to_format
from runtime.errors import BackendError
from runtime.images.frames import DeviceFrame, DevicePixels, device_frame
from runtime.images.preprocess import ImageProcessor, levels
from runtime.images.resampling import across_first, bicubic

ENTRY = "monoedgeResizeToTiles"

Grid = tuple[int, int]
Resize = Callable[[Any, ctypes.c_void_p], int]
"""The kernel: parameters by reference, stream → status."""

_FILTER_PARTS = ("first", "count", "weights")


class ResizeFilter(ctypes.Structure):
    """``ResizeFilter`` of ``plugins_trt/core/preprocess.h``."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _FILTER_PARTS), ("taps", ctypes.c_int32))


class ResizeParams(ctypes.Structure):
    """``ResizeParams`` of the same file."""

    _fields_ = (
        ("frame", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rowStride", "pixelStride", "channelStride")),
        *((name, ctypes.c_int32) for name in ("width", "height", "columns", "rows", "tileSize", "acrossFirst")),
        ("across", ResizeFilter),
        ("down", ResizeFilter),
        ("levels", ctypes.c_void_p),
        ("elementSize", ctypes.c_int32),
        ("tiles", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspaceSize", ctypes.c_size_t),
    )


def open_resize() -> Resize:
    """Finds the kernel in the plugin library.

    Raises:
        BackendError: there is no library, or one without the kernel.
    """
    path = plugin_library()
    try:
        resize: Resize = getattr(ctypes.CDLL(str(path)), ENTRY)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot resize pictures ({error}): build it again with: {BUILD_COMMAND}") from None
    return resize


class Tiler:
    """Makes tiles in the number format and of the size that a vision plan reads.

    What depends only on a picture's size is kept for the next picture: those of a camera have the same size.

    Args:
        device: the GPU.
        layout: of the vision plan.
        resize: the kernel's entry.
        encode: computes the embeddings of the tiles.
    """

    _numbers = itertools.count()

    def __init__(
        self, device: Device, layout: VisionLayout, resize: Resize, encode: Callable[[DevicePixels], npt.NDArray[Any]]
    ) -> None:
        self._device, self._tile, self._resize, self._encode = device, layout.tile, resize, encode
        self._done = device.event()
        weakref.finalize(self, device.release, [self._done])
        self._prepared: tuple[object, _Tables] | None = None

    def __call__(self, image: object, processor: ImageProcessor, max_tiles: int | None) -> DevicePixels:
        """Makes the tiles of a picture, whose memory may then be written again.

        Raises:
            ImageError: it is no picture.
            OptionError: ``max_tiles`` is out of range.
        """
        device, tile = self._device, self._tile
        frame = device_frame(image, device.stream, device.synchronize)
        grids = processor.grids(frame.width, frame.height, max_tiles)
        tables = self._tables(frame, grids, processor)
        tiles = sum(columns * rows for columns, rows in grids)
        memory = device.allocate(tiles * tile.nbytes)
        pixels = DevicePixels(memory.address, tiles, f"frame {next(self._numbers)}", self._encode)
        weakref.finalize(pixels, device.release, [memory])
        target = memory.address
        for (columns, rows), params in zip(grids, tables.params, strict=True):
            params.frame = frame.address
            params.rowStride, params.pixelStride, params.channelStride = frame.strides
            params.tiles = target
            if status := self._resize(ctypes.byref(params), ctypes.c_void_p(device.stream)):
                raise BackendError(f"resizing a picture of {frame.width}×{frame.height} failed: CUDA error {status}")
            target += columns * rows * tile.nbytes
        self._done.record()
        self._done.wait()
        return pixels

    def _tables(self, frame: DeviceFrame, grids: list[Grid], processor: ImageProcessor) -> _Tables:
        key = (frame.width, frame.height, tuple(grids))
        if self._prepared is None or self._prepared[0] != key:
            # Those of the last size are freed first, so there need not be room for both.
            self._prepared = None
            self._prepared = (key, _Tables(self._device, self._tile, frame, grids, processor))
        return self._prepared[1]


class _Tables:
    """Weights, levels and workspace in device memory, for pictures of one size."""

    def __init__(
        self, device: Device, tile: Buffer, frame: DeviceFrame, grids: Iterable[Grid], processor: ImageProcessor
    ) -> None:
        size = processor.image_size
        values = np.empty((3, 256), tile.dtype)
        to_format(levels(processor.mean, processor.std), values)
        arrays: dict[str, npt.NDArray[Any]] = {"levels": values}
        self.params, workspace = [], 0
        for index, (columns, rows) in enumerate(grids):
            width, height = columns * size, rows * size
            first = across_first((frame.width, frame.height), (width, height))
            workspace = max(workspace, 3 * (width * frame.height if first else frame.width * height))
            filters = {"across": bicubic(frame.width, width), "down": bicubic(frame.height, height)}
            for direction, filter_ in filters.items():
                arrays |= {f"{index}.{direction}.{part}": getattr(filter_, part) for part in _FILTER_PARTS}
            params = ResizeParams(columns=columns, rows=rows, tileSize=size, acrossFirst=first)
            params.width, params.height, params.elementSize = frame.width, frame.height, tile.dtype.itemsize
            self.params.append(params)
        buffers = {name: Buffer(array.dtype, array.shape) for name, array in arrays.items()}
        offsets, total = place(buffers | {"workspace": Buffer(np.dtype(np.uint8), (workspace,))})
        held = list[Resource]()
        with released_on_failure(device, held):
            host = device.allocate_host(offsets["workspace"])
            held.append(host)
            memory = device.allocate(total)
            held.append(memory)
        weakref.finalize(self, device.release, held)
        for name, array in arrays.items():
            host.array[offsets[name] : offsets[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
        device.upload(host.array, memory.address)
        at = {name: memory.address + offset for name, offset in offsets.items()}
        for index, params in enumerate(self.params):
            params.levels, params.workspace, params.workspaceSize = at["levels"], at["workspace"], workspace
            for direction in ("across", "down"):
                names = [f"{index}.{direction}.{part}" for part in _FILTER_PARTS]
                taps = arrays[f"{index}.{direction}.weights"].shape[1]
                setattr(params, direction, ResizeFilter(*(at[name] for name in names), taps))
