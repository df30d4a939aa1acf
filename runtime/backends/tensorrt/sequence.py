"""What a sequence needs on the GPU: the tensors of a decoder's call, the caches, and a way to decode with them."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.cuda.device import Device, Graph, HostMemory, Memory, Resource, released_on_failure
from runtime.backends.tensorrt.engine import Engine
from runtime.backends.tensorrt.plan import DecoderLayout, place
from runtime.errors import BackendError


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


class SequenceMemory:
    """Caches in device memory, each bound as input and as output, and the execution that decodes with them.

    They outlive their sequence, for the next: making the execution takes TensorRT a while. Its shapes and addresses
    never change, so that a recorded graph stays valid.

    Args:
        device: the GPU, which is entered here and in all calls.
        engine: the decoder's.
        layout: how it is called.
        scratch: memory for its activations, which other executions of the queue share.

    Raises:
        BackendError: there is not enough memory.
    """

    def __init__(self, device: Device, engine: Engine, layout: DecoderLayout, scratch: Memory) -> None:
        self._device = device
        self.resources: list[Resource] = []
        """In the order in which they may be freed."""
        self.failed = False
        """Whether a call failed. What is still under way there, nobody knows."""
        with released_on_failure(device, self.resources):
            self._allocate(engine, layout, scratch)
        self._graph: Graph | None = None
        self._ran = False

    def _allocate(self, engine: Engine, layout: DecoderLayout, scratch: Memory) -> None:
        device, held = self._device, self.resources
        offsets, self._size = place({past: layout.cache for past, _ in layout.caches} | {graph.LOGITS: layout.logits})
        memory = device.allocate(self._size)
        held.insert(0, memory)
        self.address = memory.address
        self.addresses = {name: memory.address + offset for name, offset in offsets.items()}
        """Of caches and logits."""
        if not layout.updates:
            self.addresses |= {present: self.addresses[past] for past, present in layout.caches}
        self._call = Call(device, layout, 1)
        held[:0] = self._call.resources
        host = device.allocate_host(layout.logits.nbytes)
        held.insert(0, host)
        self.logits = host.array.view(layout.logits.dtype)
        """In host memory, of the last token computed."""
        self.done = device.event()
        """Recorded behind each call."""
        held.insert(0, self.done)
        execution = engine.execution(layout.profile(1).index, scratch, static=True)
        held.insert(0, execution)
        execution.set_shapes(layout.shapes(1))
        execution.set_addresses(self._call.addresses | self.addresses)
        self._execution = execution

    def clear(self) -> None:
        """Enqueues filling the caches with zeros: masked values are multiplied by 0, and 0 · NaN would be NaN."""
        self._device.zero(self.address, self._size)

    def decode(self, embeds: Array, mask: npt.NDArray[np.bool_], start: int) -> None:
        """Enqueues one token, by a recorded graph from the second on."""
        self._call.write(embeds, mask, start)
        # The first run does work of TensorRT's own, which a graph must not record.
        if self._graph is None and self._ran and self._device.has_graphs and self._execution.capturable:
            self._capture()
        if self._graph is not None and self._device.has_graphs:
            self._graph.replay()
        else:
            self._token()
            self._ran = True
        # Not in the graph: where they go changes with each token.
        self._call.update(self.addresses, start, 1)

    def _capture(self) -> None:
        try:
            self._graph = self._device.capture(self._token)
        except BackendError as error:
            self._device.has_graphs = False
            warnings.warn(f"tokens are computed without a CUDA graph, which is slower: {error}", stacklevel=2)
        else:
            # Freed first, since the execution must outlive it.
            self.resources.insert(0, self._graph)

    def _token(self) -> None:
        self._call.send()
        self._execution.enqueue()
        self.download()

    def download(self) -> None:
        """Enqueues the copy of the logits to the host."""
        self._device.download(self.addresses[graph.LOGITS], self.logits)
