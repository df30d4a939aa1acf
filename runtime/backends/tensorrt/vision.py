"""Encodes images with the vision engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.cuda.device import Device, HostMemory, Memory, Resource, released_on_failure
from runtime.backends.tensorrt.engine import Engine, Execution
from runtime.backends.tensorrt.plan import Buffer, VisionLayout
from runtime.bundle.manifest import to_format
from runtime.images.frames import DevicePixels


class Vision:
    """The vision engine with its memory."""

    def __init__(self, device: Device, engine: Engine, layout: VisionLayout, scratch: Memory) -> None:
        self._device, self._engine, self.layout = device, engine, layout
        self.resources: list[Resource] = []
        """In the order in which they may be freed: executions before the memory that they work in."""
        with released_on_failure(device, self.resources):
            self._allocate(scratch)

    def _allocate(self, scratch: Memory) -> None:
        device, engine, layout, held = self._device, self._engine, self.layout, self.resources
        if engine.info.scratch > scratch.size:
            scratch = device.allocate(engine.info.scratch)
            held.insert(0, scratch)
        pairs = []
        for tile in (layout.tile, layout.tokens):
            host = device.allocate_host(layout.chunk * tile.nbytes)
            held.insert(0, host)
            memory = device.allocate(layout.chunk * tile.nbytes)
            held.insert(0, memory)
            pairs.append((host, memory))
        self._pixels, self._tokens = pairs
        self._done = device.event()
        held.insert(0, self._done)
        self._executions: dict[int, Execution] = {}
        for profile in layout.profiles:
            execution = engine.execution(profile.index, scratch, static=False)
            held.insert(0, execution)
            execution.set_addresses(
                {graph.PIXEL_VALUES: self._pixels[1].address, graph.VISUAL_EMBEDS: self._tokens[1].address}
            )
            self._executions[profile.index] = execution

    def encode(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        """Takes float32 [tiles, 3, size, size] to [tiles · tokens_per_tile, hidden]."""
        host, target = self._pixels

        def upload(start: int, tiles: int) -> None:
            pixels = _rows(host, self.layout.tile, tiles)
            to_format(pixel_values[start : start + tiles], pixels)
            self._device.upload(pixels, target.address)

        return self._encode(len(pixel_values), upload)

    def encode_device(self, pixels: DevicePixels) -> Array:
        """Encodes tiles in device memory in the same way."""
        nbytes, target = self.layout.tile.nbytes, self._pixels[1].address

        def copy(start: int, tiles: int) -> None:
            size = tiles * nbytes
            self._device.copy_rows(pixels.address + start * nbytes, size, target, size, width=size, rows=1)

        return self._encode(len(pixels), copy)

    def _encode(self, count: int, fill: Callable[[int, int], None]) -> Array:
        """Encodes tiles chunk by chunk; ``fill`` puts so many of them, from a first one on, where the engine reads."""
        layout = self.layout
        parts = []
        for start in range(0, count, layout.chunk):
            tiles = min(layout.chunk, count - start)
            fill(start, tiles)
            execution = self._executions[layout.profile(tiles).index]
            execution.set_shapes({graph.PIXEL_VALUES: (tiles, *layout.tile.shape)})
            execution.enqueue()
            tokens = _rows(self._tokens[0], layout.tokens, tiles)
            self._device.download(self._tokens[1].address, tokens)
            self._done.record()
            self._done.wait()
            parts.append(tokens.copy())
        return np.concatenate(parts).reshape(-1, layout.tokens.shape[-1])


def _rows(host: HostMemory, part: Buffer, count: int) -> Array:
    return host.array[: count * part.nbytes].view(part.dtype).reshape(count, *part.shape)
