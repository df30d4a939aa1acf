"""The tensors of a decoder's call, except the caches: small inputs, and updates for the caches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.cuda.device import Device, HostMemory, Memory, Resource, released_on_failure
from runtime.backends.tensorrt.plan import DecoderLayout, place


class Call:
    """Memory for a call's inputs except the caches, and for its new keys and values.

    The inputs have one block of host memory and one of device memory, and are sent in one copy. Updates, with copies
    from there into the caches, are only for engines that do not write into the caches.
    """

    def __init__(self, device: Device, layout: DecoderLayout, tokens: int) -> None:
        self._device, self._layout = device, layout
        self.resources: list[Resource] = []
        with released_on_failure(device, self.resources):
            self._allocate(tokens)

    def _allocate(self, tokens: int) -> None:
        device, layout, held = self._device, self._layout, self.resources
        buffers = layout.inputs(tokens)
        offsets, size = place(buffers)
        self._host: HostMemory = device.allocate_host(size)
        held.insert(0, self._host)
        memory: Memory = device.allocate(size)
        held.insert(0, memory)
        self._target, self._size = memory.address, size
        self.addresses = {name: memory.address + offset for name, offset in offsets.items()}
        self._arrays = {
            name: self._host.array[offset : offset + buffers[name].nbytes].view(buffers[name].dtype)
            for name, offset in offsets.items()
        }
        self._embeds_at = offsets[graph.INPUTS_EMBEDS]
        if layout.updates:
            offsets, size = place({update: layout.update(tokens) for _, update in layout.caches})
            memory = device.allocate(size)
            held.insert(0, memory)
            self.addresses |= {name: memory.address + offset for name, offset in offsets.items()}
        self._sent = device.event()
        held.insert(0, self._sent)

    def write(self, embeds: Array, mask: npt.NDArray[np.bool_], start: int) -> None:
        """Fills the host memory with up to ``tokens`` tokens, once the GPU has read what was there."""
        self._sent.wait()
        tokens = len(embeds)
        self._arrays[graph.WRITE_INDICES][:] = start
        self._arrays[graph.POSITION_IDS][:tokens] = np.arange(start, start + tokens)
        self._arrays[graph.VISUAL_MASK][:tokens] = mask
        self._arrays[graph.INPUTS_EMBEDS][: embeds.size] = embeds.reshape(-1)
        self._size = self._embeds_at + embeds.nbytes

    def send(self) -> None:
        """Enqueues the copy of what was written."""
        self._device.upload(self._host.array[: self._size], self._target)

    def upload(self, embeds: Array, mask: npt.NDArray[np.bool_], start: int) -> None:
        """Writes and sends, and records when the host memory is free again."""
        self.write(embeds, mask, start)
        self.send()
        self._sent.record()

    def update(self, caches: dict[str, int], start: int, tokens: int) -> None:
        """Enqueues the copies of a call's updates, if it has any, into the caches at these addresses."""
        if not self._layout.updates:
            return
        cache = self._layout.cache
        heads = cache.shape[1]
        width = self._layout.update(tokens).nbytes // heads
        token = width // tokens
        for past, name in self._layout.caches:
            source, target = self.addresses[name], caches[past] + start * token
            self._device.copy_rows(source, width, target, cache.nbytes // heads, width=width, rows=heads)
