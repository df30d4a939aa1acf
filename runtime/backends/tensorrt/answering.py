"""Runs the engines of a bundle on a GPU, with copies, work and waits in order.

The GPU has one queue. A call fills host memory, enqueues copies and work, records an event, lets the next thread in,
and waits for the event: once for each chunk of a prompt, once for each token. All executions use one scratch memory,
since no two run at once; a small board has room for one only.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.cuda.device import Device, Graph, Resource
from runtime.backends.tensorrt.call import Call
from runtime.backends.tensorrt.engine import Engine
from runtime.backends.tensorrt.pixels import Resize, Tiler
from runtime.backends.tensorrt.plan import DecoderLayout, VisionLayout, place
from runtime.backends.tensorrt.vision import Vision
from runtime.errors import BackendError
from runtime.images.frames import DeviceImage, DevicePixels
from runtime.images.preprocess import ImageProcessor


class EngineBackend:
    """A decoder engine, and a vision engine from the first image on.

    Args:
        device: the GPU.
        decoder: the decoder's engine and layout.
        open_vision: loads the engine and layout of the vision graph.
        description: what computes, for people: library, version and device.
        open_resize: finds the kernel that makes tiles from pictures in device memory.
        length_limit: why a conversation can be no longer than the engine's caches, for people.
    """

    def __init__(
        self,
        device: Device,
        decoder: tuple[Engine, DecoderLayout],
        open_vision: Callable[[], tuple[Engine, VisionLayout]],
        open_resize: Callable[[], Resize],
        description: str,
        length_limit: str,
    ) -> None:
        self.description, self.length_limit = description, length_limit
        self.device, (self.engine, self.layout) = device, decoder
        self.chunk, self.max_length = self.layout.chunk, self.layout.capacity
        self.lock = threading.Lock()
        """Held while work is enqueued, so that calls of several threads do not mix."""
        self._open_vision, self._open_resize = open_vision, open_resize
        self._vision: Vision | None = None
        self._tiler: Tiler | None = None
        with device:
            self.scratch = device.allocate(self.engine.info.scratch)
            self._prefills = {
                profile.index: self.engine.execution(profile.index, self.scratch, static=False)
                for profile in self.layout.profiles
                if profile.maximum > 1
            }
            self._call = Call(device, self.layout, self.chunk)
        self._held: list[Resource] = [*self._prefills.values(), *self._call.resources, self.scratch]
        weakref.finalize(self, device.release, self._held)

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        """Takes [tiles, 3, size, size] to [tiles · tokens_per_tile, hidden]."""
        with self.lock, self.device:
            return self._opened_vision().encode(pixel_values)

    def _encode_device(self, pixels: DevicePixels) -> Array:
        with self.lock, self.device:
            return self._opened_vision().encode_device(pixels)

    def frame_pixels(self, image: DeviceImage, processor: ImageProcessor, max_tiles: int | None) -> DevicePixels:
        """Makes the tiles of a picture in device memory, without the host."""
        with self.lock, self.device:
            if self._tiler is None:
                self._tiler = Tiler(self.device, self._opened_vision().layout, self._open_resize(), self._encode_device)
            return self._tiler(image, processor, max_tiles)

    def _opened_vision(self) -> Vision:
        if self._vision is None:
            self._vision = Vision(self.device, *self._open_vision(), self.scratch)
            self._held[:0] = self._vision.resources
        return self._vision

    def new_context(self) -> EngineContext:
        """Returns empty caches for a new sequence."""
        return EngineContext(self)

    def prefill(self, embeds: Array, mask: npt.NDArray[np.bool_], start: int, addresses: dict[str, int]) -> None:
        """Enqueues tokens of a prompt; ``addresses`` are those of the sequence's caches and logits."""
        execution = self._prefills[self.layout.profile(len(embeds)).index]
        self._call.upload(embeds, mask, start)
        execution.set_shapes(self.layout.shapes(len(embeds)))
        execution.set_addresses(self._call.addresses | addresses)
        execution.enqueue()
        self._call.update(addresses, start, len(embeds))


class EngineContext:
    """The caches of one sequence in device memory, each bound as input and as output.

    Decoding has an execution of its own, whose shapes and addresses never change, so that a recorded graph stays valid.
    Prompts are computed by executions that all sequences share.
    """

    def __init__(self, backend: EngineBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._graph: Graph | None = None
        self._ran = False

    def reserve(self, capacity: int) -> None:
        """Allocates the caches, for as many tokens as the engine was built for."""
        backend = self._backend
        if capacity > backend.max_length:
            raise BackendError(f"{capacity} tokens were asked for, but {backend.length_limit}")
        if not self.capacity:
            with backend.lock, backend.device:
                self._allocate(backend.device, backend.layout)
            self.capacity = backend.max_length

    def _allocate(self, device: Device, layout: DecoderLayout) -> None:
        offsets, size = place({past: layout.cache for past, _ in layout.caches} | {graph.LOGITS: layout.logits})
        try:
            memory = device.allocate(size)
        except BackendError as error:
            raise BackendError(
                f"the caches for {layout.capacity} tokens do not fit: {error}; end other sessions, or build an engine "
                "for fewer tokens (--max-length)"
            ) from None
        # Zeros: masked values are multiplied by 0, and 0 · NaN would be NaN.
        device.zero(memory.address, size)
        self._addresses = {name: memory.address + offset for name, offset in offsets.items()}
        if not layout.updates:
            self._addresses |= {present: self._addresses[past] for past, present in layout.caches}
        self._call = Call(device, layout, 1)
        host = device.allocate_host(layout.logits.nbytes)
        self._logits = host.array.view(layout.logits.dtype)
        self._done = device.event()
        self._execution = self._backend.engine.execution(layout.profile(1).index, self._backend.scratch, static=True)
        self._execution.set_shapes(layout.shapes(1))
        self._execution.set_addresses(self._call.addresses | self._addresses)
        self._held: list[Resource] = [self._execution, self._done, host, memory, *self._call.resources]
        weakref.finalize(self, device.release, self._held)

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array:
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        backend = self._backend
        with backend.device:
            with backend.lock:
                if len(inputs_embeds) == 1:
                    self._call.write(inputs_embeds, visual_mask, start)
                    self._enqueue_token()
                    # Not in the graph: where they go changes with each token.
                    self._call.update(self._addresses, start, 1)
                else:
                    backend.prefill(inputs_embeds, visual_mask, start, self._addresses)
                    self._download()
                self._done.record()
            self._done.wait()
        return self._logits.copy()

    def _enqueue_token(self) -> None:
        # The first run does work of TensorRT's own, which a graph must not record.
        if self._graph is None and self._ran and self._backend.device.has_graphs and self._execution.capturable:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._token()
            self._ran = True

    def _capture(self) -> None:
        device = self._backend.device
        try:
            self._graph = device.capture(self._token)
        except BackendError as error:
            device.has_graphs = False
            warnings.warn(f"tokens are computed without a CUDA graph, which is slower: {error}", stacklevel=2)
        else:
            # Freed first, since the execution must outlive it.
            self._held.insert(0, self._graph)

    def _token(self) -> None:
        self._call.send()
        self._execution.enqueue()
        self._download()

    def _download(self) -> None:
        self._backend.device.download(self._addresses[graph.LOGITS], self._logits)
