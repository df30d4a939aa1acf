"""CUDA graphs through NVIDIA's ``cuda-bindings``, since PyCUDA has no calls for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver

from runtime.errors import BackendError


class CudaGraph:
    """Recorded work of one stream.

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
