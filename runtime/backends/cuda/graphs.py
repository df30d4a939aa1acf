"""CUDA graphs, through NVIDIA's ``cuda-bindings``, since PyCUDA has no calls for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from runtime.backends.cuda.context import Owned, Stream
from runtime.errors import BackendError, as_backend_error

try:
    from cuda.bindings import driver
except ImportError:
    driver = None

HAS_GRAPHS = driver is not None


class CudaGraph:
    """Recorded work of one stream.

    Args:
        stream: to record on and to replay on; the context is current.
        work: enqueues what is to be recorded, in this thread. Nothing of it runs.

    Raises:
        BackendError: a part of it cannot be recorded; the stream is as it was.
    """

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        self._stream = driver.CUstream(stream[0].handle)
        # Other threads may allocate meanwhile.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # The capture has to be ended; why it failed is reported already.
            with contextlib.suppress(BackendError):
                _call("cuGraphDestroy", _call("cuStreamEndCapture", self._stream))
            raise
        graph = _call("cuStreamEndCapture", self._stream)
        try:
            self._executable = _call("cuGraphInstantiate", graph, 0)
        finally:
            driver.cuGraphDestroy(graph)
        executable = self._executable
        self._owned = Owned(self, stream, lambda: driver.cuGraphExecDestroy(executable))

    def replay(self) -> None:
        """Enqueues the work on its stream."""
        _call("cuGraphLaunch", self._executable, self._stream)

    def free(self) -> None:
        """Frees the graph."""
        self._owned.free()


def _call(name: str, *arguments: Any) -> Any:  # noqa: ANN401 - whatever the call takes and returns
    """Calls the driver; returns the value of its (status, value)."""
    # What the driver has no such function for is a RuntimeError.
    with as_backend_error("CUDA graph", RuntimeError):
        status, *values = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"CUDA graph: {status.name}")
    return values[0] if values else None
