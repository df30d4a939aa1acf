"""The kernel that cuts pictures in device memory into tiles, against Pillow, bit for bit.

    python -m benchmarks.gpu_day.pixels LIBRARY    # the plugin library

The runtime's own ``Tiler`` calls it, on memory that the driver gives without a package.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_day.memory import Gpu, Host
from runtime.backends.cuda.device import HostMemory, Memory, Resource
from runtime.backends.tensorrt.pixels import ENTRY, Tiler
from runtime.backends.tensorrt.plan import Buffer, Profile, VisionLayout
from runtime.bundle.manifest import to_format
from runtime.console.run import run
from runtime.errors import MonoedgeError
from runtime.images.preprocess import ImageProcessor

SIZES = ((40, 90), (97, 31), (32, 32), (448, 448), (1080, 1920))
"""Height and width of pictures: shrunk, stretched, and as they are."""

TILES = ((32, 6), (448, 12))
"""Side of a tile, and how many at most."""

TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


class Frame:
    """A picture in device memory, by ``__cuda_array_interface__``, as a camera's library shows it."""

    def __init__(self, memory: Gpu | Host, array: np.ndarray) -> None:
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (memory.put(array), False),
            "version": 3,
            "strides": None,
            "stream": None,
        }


class OfMemory:
    """What ``Tiler`` needs of a ``Device``, all on the default stream; also its one event."""

    stream = 0

    def __init__(self, memory: Gpu | Host) -> None:
        self.memory = memory

    def allocate(self, size: int) -> Memory:
        """Returns memory that lives until all of it is cleared."""
        return Memory(self.memory.empty(size), size, lambda: None)

    def allocate_host(self, size: int) -> HostMemory:
        """Returns host memory, which need not be page-locked for copies that wait."""
        return HostMemory(np.zeros(size, np.uint8), lambda: None)

    def upload(self, source: np.ndarray, address: int) -> None:
        """Copies and waits."""
        self.memory.write(source, address)

    def event(self) -> OfMemory:
        """Returns itself: whoever waits for it waits for everything."""
        return self

    def record(self) -> None:
        """Needs nothing."""

    def wait(self) -> None:
        """Waits for everything."""
        self.memory.synchronize()

    synchronize = wait

    def release(self, resources: Iterable[Resource]) -> None:
        """Leaves them until all is cleared."""


def main() -> None:
    """Cuts pictures of several sizes into tiles of several kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--memory", choices=("gpu", "host"), default="gpu", help="host: the kernel is emulated")
    arguments = parser.parse_args()
    memory: Gpu | Host = Gpu() if arguments.memory == "gpu" else Host()
    resize = getattr(ctypes.CDLL(str(arguments.library.absolute())), ENTRY)
    generator, count = np.random.default_rng(0), 0
    for (side, most), (name, dtype) in ((tiles, kind) for tiles in TILES for kind in TYPES.items()):
        processor = ImageProcessor(side, side // 8, 1, most, True, True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        tile = Buffer(np.dtype(dtype), (3, side, side))
        layout = VisionLayout((Profile(0, 1, most + 1),), tile, Buffer(np.dtype(dtype), (4, 8)))
        device: Any = OfMemory(memory)
        tiler = Tiler(device, layout, resize, lambda pixels: np.empty(0))
        for height, width in SIZES:
            picture = generator.integers(0, 256, (height, width, 3), np.uint8)
            pixels = tiler(Frame(memory, picture), processor, most)
            got = memory.get(pixels.address, len(pixels) * tile.nbytes).view(dtype).reshape(-1, 3, side, side)
            expected = np.empty(got.shape, dtype)
            to_format(processor(picture, most), expected)
            if not np.array_equal(got, expected):
                wrong = np.count_nonzero(got != expected)
                raise MonoedgeError(f"{width}×{height} in {name}, tiles of {side}: {wrong} of {got.size} values differ")
            count += 1
        del tiler
        memory.clear()
    print(f"tiles of {count} pictures have the bits that the host computes with Pillow")


if __name__ == "__main__":
    run(main)
