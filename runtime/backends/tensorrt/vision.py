"""The vision engine with its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Pixels, graph
from runtime.backends.cuda.device import Device, Memory, Resource
from runtime.backends.tensorrt.execution import Engine, Execution
from runtime.backends.tensorrt.plan import VisionLayout
from runtime.images.frames import DevicePixels

Array = npt.NDArray[Any]


class Vision:
    """The vision engine with its memory."""

    def __init__(self, device: Device, engine: Engine, layout: VisionLayout, scratch: Memory) -> None:
        self._device, self._engine, self.layout = device, engine, layout
        self.resources: list[Resource] = []
        if engine.info.scratch > scratch.size:
            scratch = device.allocate(engine.info.scratch)
            self.resources.append(scratch)
        self._executions: dict[int, Execution] = {
            profile.index: engine.execution(profile.index, scratch, static=False) for profile in layout.profiles
        }
        self._pixels, self._tokens = (
            (device.allocate_host(layout.chunk * tile.nbytes), device.allocate(layout.chunk * tile.nbytes))
            for tile in (layout.tile, layout.tokens)
        )
        self._done = device.event()
        # Executions before the memory that they work in.
        self.resources = [*self._executions.values(), self._done, *self._pixels, *self._tokens, *self.resources]
        for execution in self._executions.values():
            execution.set_addresses(
                {graph.PIXEL_VALUES: self._pixels[1].address, graph.VISUAL_EMBEDS: self._tokens[1].address}
            )

    def __call__(self, pixel_values: Pixels) -> Array:
        """[tiles, 3, size, size] → [tiles · tokens_per_tile, hidden]."""
        layout, count = self.layout, len(pixel_values)
        parts = [
            self._encode(pixel_values, start, min(layout.chunk, count - start))
            for start in range(0, count, layout.chunk)
        ]
        return np.concatenate(parts).reshape(-1, layout.tokens.shape[-1])

    def _encode(self, pixel_values: Pixels, start: int, tiles: int) -> Array:
        layout, size = self.layout, tiles * self.layout.tile.nbytes
        pixels, tokens = (
            memory[0].array[: tiles * part.nbytes].view(part.dtype).reshape(tiles, *part.shape)
            for memory, part in ((self._pixels, layout.tile), (self._tokens, layout.tokens))
        )
        target = self._pixels[1].address
        if isinstance(pixel_values, DevicePixels):
            source = pixel_values.address + start * layout.tile.nbytes
            self._device.copy_rows(source, size, target, size, width=size, rows=1)
        else:
            graph.to_format(pixel_values[start : start + tiles], pixels)
            self._device.upload(pixels, target)
        execution = self._executions[layout.profile(tiles).index]
        execution.set_shapes({graph.PIXEL_VALUES: (tiles, *layout.tile.shape)})
        execution.enqueue()
        self._device.download(self._tokens[1].address, tokens)
        self._done.record()
        self._done.wait()
        return tokens.copy()
