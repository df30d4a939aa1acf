"""The GPU through PyCUDA; ``runtime.backends.cuda.device`` describes each call."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.cuda.device import Graph, Resource
from runtime.bundle.reader import size_text
from runtime.errors import BackendError, as_backend_error

try:
    import pycuda.driver as cuda
except ImportError as error:
    if error.name == "pycuda":
        raise BackendError("pycuda is not installed; this adds it: pip install pycuda") from None
    raise BackendError(f"pycuda cannot be imported: {error}; it needs NVIDIA's driver and a GPU") from None

try:
    from runtime.backends.cuda.graphs import CudaGraph
except ImportError:
    CudaGraph = None  # type: ignore[assignment, misc]


_NON_BLOCKING = 1
"""CUDA's flag for a stream that does not wait for the default stream, which other libraries may use."""


class PyCudaDevice:
    """The first GPU that CUDA shows (``CUDA_VISIBLE_DEVICES`` chooses), in its primary context.

    TensorRT, PyTorch and other libraries of this process share that context.

    Raises:
        BackendError: there is none.
    """

    def __init__(self) -> None:
        with as_backend_error("no GPU can be used", cuda.Error):
            cuda.init()
            device = cuda.Device(0)
            self._context = device.retain_primary_context()
        self.name = device.name()
        major, minor = device.compute_capability()
        self.compute_capability = 10 * major + minor
        self.has_graphs = CudaGraph is not None
        self._released: deque[Resource] = deque()
        self._capturing: int | None = None
        with self:
            self._stream = cuda.Stream(_NON_BLOCKING)
        self.stream: int = self._stream.handle

    def __enter__(self) -> PyCudaDevice:
        self._context.push()
        return self

    def __exit__(self, *error: object) -> None:
        cuda.Context.pop()

    def allocate(self, size: int) -> _Memory:
        """Allocates device memory."""
        return _Memory(self._allocated(lambda: cuda.mem_alloc(max(size, 1)), size, "of the GPU's memory"), size)

    def allocate_host(self, size: int) -> _HostMemory:
        """Allocates page-locked host memory."""
        return _HostMemory(self._allocated(lambda: cuda.pagelocked_empty(size, np.uint8), size, "of host memory"))

    def _allocated(self, allocate: Callable[[], Any], size: int, what: str) -> Any:  # noqa: ANN401 - PyCUDA's
        try:
            return allocate()
        except cuda.MemoryError:
            free, total = cuda.mem_get_info()
            raise BackendError(
                f"{size_text(size)} {what} are needed, {size_text(free)} of {size_text(total)} are free on {self.name}"
            ) from None

    def event(self) -> _Event:
        """Returns a new event."""
        flags = cuda.event_flags
        return _Event(cuda.Event(flags.DISABLE_TIMING | flags.BLOCKING_SYNC), self._stream)

    def upload(self, source: npt.NDArray[Any], address: int) -> None:
        """Enqueues a copy from host to device."""
        with as_backend_error("copying to the GPU failed", cuda.Error):
            cuda.memcpy_htod_async(address, source, self._stream)

    def download(self, address: int, target: npt.NDArray[Any]) -> None:
        """Enqueues a copy from device to host."""
        with as_backend_error("copying from the GPU failed", cuda.Error):
            cuda.memcpy_dtoh_async(target, address, self._stream)

    def synchronize(self) -> None:
        """Waits for all streams of the context, which is that of the whole process."""
        with as_backend_error("the GPU failed", cuda.Error):
            cuda.Context.synchronize()

    def zero(self, address: int, size: int) -> None:
        """Enqueues filling with zeros."""
        with as_backend_error("filling the GPU's memory failed", cuda.Error):
            cuda.memset_d8_async(address, 0, size, self._stream)

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        """Enqueues a copy within the device, row by row."""
        copy = cuda.Memcpy2D()
        copy.set_src_device(source)
        copy.set_dst_device(target)
        copy.src_pitch, copy.dst_pitch = source_pitch, target_pitch
        copy.width_in_bytes, copy.height = width, rows
        with as_backend_error("copying within the GPU failed", cuda.Error):
            copy(self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` enqueues as a CUDA graph."""
        self._capturing = threading.get_ident()
        try:
            return CudaGraph(self.stream, work)
        finally:
            self._capturing = None
            self.release()

    def release(self, *resources: Resource) -> None:
        """Frees resources; during a capture in this thread only after it, since freeing would end the capture."""
        self._released.extend(resources)
        if self._capturing == threading.get_ident():
            return
        with self:
            while self._released:
                self._released.popleft().free()


class _Memory:
    def __init__(self, allocation: Any, size: int) -> None:  # noqa: ANN401 - PyCUDA's
        self._allocation = allocation
        self.address, self.size = int(allocation), size

    def free(self) -> None:
        self._allocation.free()


class _HostMemory:
    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array

    def free(self) -> None:
        # Views may keep the array; its memory is freed all the same.
        self.array.base.free()  # type: ignore[union-attr] # PyCUDA's allocation


class _Event:
    def __init__(self, event: Any, stream: Any) -> None:  # noqa: ANN401 - PyCUDA's
        self._event, self._stream = event, stream

    def record(self) -> None:
        with as_backend_error("the GPU failed", cuda.Error):
            self._event.record(self._stream)

    def wait(self) -> None:
        with as_backend_error("the GPU failed", cuda.Error):
            self._event.synchronize()

    def free(self) -> None:
        # PyCUDA frees with its object, here where the context is entered.
        del self._event
