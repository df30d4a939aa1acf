"""The GPU through PyCUDA; ``runtime.backends.cuda.device`` describes each call."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.cuda.device import Graph, HostMemory, Memory, Resource
from runtime.bundle.reader import size_text
from runtime.errors import BackendError, as_backend_error

try:
    import pycuda.driver as cuda
except ImportError as error:
    if error.name == "pycuda":
        raise BackendError("pycuda is not installed; this adds it: pip install pycuda") from None
    raise BackendError(f"pycuda cannot be imported: {error}; it needs NVIDIA's driver and a GPU") from None

try:
    from cuda.bindings import driver
except ImportError:
    driver = None

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
        self.has_graphs = driver is not None
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

    def allocate(self, size: int) -> Memory:
        """Allocates device memory."""
        allocation = self._allocated(lambda: cuda.mem_alloc(max(size, 1)), size, "of the GPU's memory")
        return Memory(int(allocation), size, allocation.free)

    def allocate_host(self, size: int) -> HostMemory:
        """Allocates page-locked host memory."""
        array = self._allocated(lambda: cuda.pagelocked_empty(size, np.uint8), size, "of host memory")
        # Views may keep the array; its memory is freed all the same.
        return HostMemory(array, array.base.free)

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
            return _CudaGraph(self.stream, work)
        finally:
            self._capturing = None
            self.release([])

    def release(self, resources: Iterable[Resource]) -> None:
        """Frees resources; during a capture in this thread only after it, since freeing would end the capture."""
        self._released.extend(resources)
        if self._capturing == threading.get_ident():
            return
        with self:
            while self._released:
                self._released.popleft().free()


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


class _CudaGraph:
    """Recorded work of one stream, through NVIDIA's ``cuda-bindings``, since PyCUDA has no calls for it.

    Args:
        stream: handle of the stream to record on and to replay on; its context is current.
        work: enqueues what is to be recorded, in this thread. Nothing of it runs.

    Raises:
        BackendError: a part of it cannot be recorded; the stream is as it was.
    """

    def __init__(self, stream: int, work: Callable[[], None]) -> None:
        self._stream = driver.CUstream(stream)
        # Other threads may allocate meanwhile.
        _check(
            driver.cuStreamBeginCapture(self._stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        )
        try:
            work()
        except BaseException:
            # The capture has to be ended; why it failed is reported already.
            with contextlib.suppress(BackendError):
                driver.cuGraphDestroy(_check(driver.cuStreamEndCapture(self._stream)))
            raise
        graph = _check(driver.cuStreamEndCapture(self._stream))
        try:
            self._executable = _check(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)

    def replay(self) -> None:
        """Enqueues the work on its stream."""
        _check(driver.cuGraphLaunch(self._executable, self._stream))

    def free(self) -> None:
        """Frees the graph."""
        driver.cuGraphExecDestroy(self._executable)


def _check(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the call returns
    """Returns the value of a call's (status, value)."""
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"CUDA graph: {status.name}")
    return values[0] if values else None
