"""The GPU through PyCUDA; ``runtime.backends.cuda.device`` describes each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.cuda.context import Owned, Stream, capturing, cuda, enter, leave, release
from runtime.backends.cuda.device import Graph, HostMemory, Memory, Resource
from runtime.backends.cuda.graphs import HAS_GRAPHS, CudaGraph
from runtime.bundle.reader import size_text
from runtime.errors import BackendError, as_backend_error

_NON_BLOCKING = 1
"""CUDA's flag for a stream that does not wait for the default stream, which other libraries may use."""


class PyCudaDevice:
    """The first GPU that CUDA shows (``CUDA_VISIBLE_DEVICES`` chooses), in its primary context.

    TensorRT, PyTorch and other libraries of this process share that context, and so do several devices.

    Raises:
        BackendError: there is none.
    """

    def __init__(self) -> None:
        self.has_graphs = HAS_GRAPHS
        self._queue: Stream = []
        with as_backend_error("no GPU can be used", cuda.Error), self:
            device = cuda.Context.get_device()
            self.name = device.name()
            major, minor = device.compute_capability()
            self._queue.append(cuda.Stream(_NON_BLOCKING))
        self.compute_capability = 10 * major + minor
        self.stream: int = self._queue[0].handle
        # At exit after all that was made later.
        self._owned = Owned(self, self._queue, self._queue.clear, at_exit=True)

    def __enter__(self) -> PyCudaDevice:
        enter()
        return self

    def __exit__(self, *error: object) -> None:
        leave()

    def allocate(self, size: int) -> Memory:
        """Allocates device memory."""
        allocation = self._allocated(lambda: cuda.mem_alloc(max(size, 1)), size, "of the GPU's memory")
        memory = Memory(int(allocation), size, allocation.free)
        memory.free = Owned(memory, self._queue, allocation.free).free
        return memory

    def allocate_host(self, size: int) -> HostMemory:
        """Allocates page-locked host memory."""
        array = self._allocated(lambda: cuda.pagelocked_empty(size, np.uint8), size, "of host memory")
        # Views may keep the array; by hand, its memory is freed all the same.
        return HostMemory(array, Owned(array, self._queue, array.base.free).free)

    def _allocated(self, allocate: Callable[[], Any], size: int, what: str) -> Any:  # noqa: ANN401 - PyCUDA's
        with as_backend_error(f"{size_text(size)} {what} cannot be allocated", cuda.Error):
            try:
                return allocate()
            except cuda.MemoryError:
                free, total = cuda.mem_get_info()
        raise BackendError(
            f"{size_text(size)} {what} are needed, {size_text(free)} of {size_text(total)} are free on {self.name}"
        )

    def event(self) -> _Event:
        """Returns a new event."""
        return _Event(self, self._queue)

    def upload(self, source: npt.NDArray[Any], address: int) -> None:
        """Enqueues a copy from host to device."""
        with as_backend_error("copying to the GPU failed", cuda.Error):
            cuda.memcpy_htod_async(address, source, self._queue[0])

    def download(self, address: int, target: npt.NDArray[Any]) -> None:
        """Enqueues a copy from device to host."""
        with as_backend_error("copying from the GPU failed", cuda.Error):
            cuda.memcpy_dtoh_async(target, address, self._queue[0])

    def synchronize(self) -> None:
        """Waits for all streams of the context, which is that of the whole process."""
        with as_backend_error("the GPU failed", cuda.Error):
            cuda.Context.synchronize()

    def zero(self, address: int, size: int) -> None:
        """Enqueues filling with zeros."""
        with as_backend_error("filling the GPU's memory failed", cuda.Error):
            cuda.memset_d8_async(address, 0, size, self._queue[0])

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        """Enqueues a copy within the device, row by row."""
        copy = cuda.Memcpy2D()
        copy.set_src_device(source)
        copy.set_dst_device(target)
        copy.src_pitch, copy.dst_pitch = source_pitch, target_pitch
        copy.width_in_bytes, copy.height = width, rows
        with as_backend_error("copying within the GPU failed", cuda.Error):
            copy(self._queue[0])

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` enqueues as a CUDA graph."""
        with capturing():
            return CudaGraph(self._queue, work)

    def release(self, resources: Iterable[Resource]) -> None:
        """Frees resources once the work that was enqueued before is done; while a thread captures, after that."""
        release(self._queue, resources)


class _Event:
    """Keeps its device, whose stream it is recorded on."""

    def __init__(self, device: PyCudaDevice, queue: Stream) -> None:
        self._device, self._queue = device, queue
        flags = cuda.event_flags
        with as_backend_error("the GPU failed", cuda.Error):
            self._events = [cuda.Event(flags.DISABLE_TIMING | flags.BLOCKING_SYNC)]
        # PyCUDA frees with its object, here where the context is current.
        self._owned = Owned(self, queue, self._events.clear)

    def record(self) -> None:
        with as_backend_error("the GPU failed", cuda.Error):
            self._events[0].record(self._queue[0])

    def wait(self) -> None:
        with as_backend_error("the GPU failed", cuda.Error):
            self._events[0].synchronize()

    def free(self) -> None:
        self._owned.free()
