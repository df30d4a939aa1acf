"""Runs the engines of a bundle on a GPU, with copies, work and waits in order.

The GPU has one queue. A call fills host memory, enqueues copies and work, records an event, lets the next thread in,
and waits for the event: once for each chunk of a prompt, once for each token. All executions use one scratch memory,
since no two run at once; a small board has room for one only.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from runtime.backends import Array
from runtime.backends.cuda.device import Device, Resource, released_on_failure
from runtime.backends.tensorrt.engine import Engine, Execution
from runtime.backends.tensorrt.pixels import Resize, Tiler
from runtime.backends.tensorrt.plan import DecoderLayout, VisionLayout
from runtime.backends.tensorrt.sequence import Call, SequenceMemory
from runtime.backends.tensorrt.vision import Vision
from runtime.errors import BackendError
from runtime.images.frames import DeviceImage, DevicePixels
from runtime.images.preprocess import ImageProcessor

T = TypeVar("T")


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
        self._held = list[Resource]()
        self._prefills: dict[int, Execution] = {}
        with device, released_on_failure(device, self._held):
            self.scratch = device.allocate(self.engine.info.scratch)
            self._held.insert(0, self.scratch)
            for profile in self.layout.profiles:
                if profile.maximum > 1:
                    execution = self.engine.execution(profile.index, self.scratch, static=False)
                    self._held.insert(0, execution)
                    self._prefills[profile.index] = execution
            self._call = Call(device, self.layout, self.chunk)
            self._held[:0] = self._call.resources
        self._idle = deque[SequenceMemory]()
        weakref.finalize(self, _free, device, self._idle, self._held)

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
            tiler = self._tiler
            return self._with_room(lambda: tiler(image, processor, max_tiles))

    def _opened_vision(self) -> Vision:
        if self._vision is None:
            self._vision = self._with_room(lambda: Vision(self.device, *self._open_vision(), self.scratch))
            self._held[:0] = self._vision.resources
        return self._vision

    def take(self) -> SequenceMemory:
        """Returns the caches of a sequence that ended, or new ones.

        Raises:
            BackendError: they do not fit.
        """
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        try:
            return SequenceMemory(self.device, self.engine, self.layout, self.scratch)
        except BackendError as error:
            raise BackendError(
                f"the caches for {self.max_length} tokens do not fit: {error}; end other sessions, or build an engine "
                "for fewer tokens (--max-length)"
            ) from None

    def give_back(self, memory: SequenceMemory) -> None:
        """Keeps the caches of a sequence that ended for the next, unless a call failed; a finalizer calls this."""
        if memory.failed:
            self.device.release(memory.resources)
        else:
            self._idle.append(memory)

    def _with_room(self, make: Callable[[], T]) -> T:
        """Makes something; where that fails, once more without the caches that wait for a next sequence."""
        try:
            return make()
        except BackendError:
            if not self._idle:
                raise
            _free(self.device, self._idle, [])
            return make()

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


def _free(device: Device, idle: deque[SequenceMemory], held: list[Resource]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            device.release(idle.pop().resources)
    device.release(held)


class EngineContext:
    """One sequence. Prompts are computed by executions that all sequences share."""

    def __init__(self, backend: EngineBackend) -> None:
        self.capacity = 0
        self._backend = backend

    def reserve(self, capacity: int) -> None:
        """Gets caches for as many tokens as the engine was built for: those of a sequence that ended, or new ones."""
        backend = self._backend
        if capacity > backend.max_length:
            raise BackendError(f"{capacity} tokens were asked for, but {backend.length_limit}")
        if self.capacity:
            return
        with backend.lock, backend.device:
            self._memory = backend.take()
            weakref.finalize(self, backend.give_back, self._memory)
            self._memory.clear()
        self.capacity = backend.max_length

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array:
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        backend, memory = self._backend, self._memory
        try:
            with backend.device:
                with backend.lock:
                    if len(inputs_embeds) == 1:
                        memory.decode(inputs_embeds, visual_mask, start)
                    else:
                        backend.prefill(inputs_embeds, visual_mask, start, memory.addresses)
                        memory.download()
                    memory.done.record()
                memory.done.wait()
        except BaseException:
            memory.failed = True
            raise
        return memory.logits.copy()
