"""What the TensorRT backend needs of a GPU, as protocols.

``runtime.backends.cuda.pycuda`` implements them for a real GPU; tests run the rest of the backend on an implementation
in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import OptionError


class Resource(Protocol):
    """Something on the GPU that is freed by hand."""

    def free(self) -> None:
        """Frees it. The GPU must be entered (see ``Device``), and must not be using it."""


@dataclass
class Memory:
    """Device memory, aligned to 256 bytes at least."""

    address: int
    size: int
    free: Callable[[], None]


@dataclass
class HostMemory:
    """Page-locked host memory: the GPU copies from and to it without the CPU."""

    array: npt.NDArray[np.uint8]
    free: Callable[[], None]


class Event(Resource, Protocol):
    """A place in the GPU's queue."""

    def record(self) -> None:
        """Places it behind all work enqueued so far."""

    def wait(self) -> None:
        """Waits until the GPU has reached it. Returns at once if nothing was recorded. Other threads run meanwhile."""


class Graph(Resource, Protocol):
    """Recorded work, which is enqueued as a whole."""

    def replay(self) -> None:
        """Enqueues it."""


class Device(Protocol):
    """One GPU and one queue of work on it (a CUDA stream): what is enqueued runs in that order.

    ``with device:`` enters its context; every call but ``release`` is made inside, in any thread.
    """

    name: str
    compute_capability: int
    """89 for 8.9."""
    stream: int
    """The queue's handle, for libraries that enqueue by themselves."""
    has_graphs: bool
    """Whether ``capture`` works."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...

    def allocate(self, size: int) -> Memory:
        """Allocates device memory.

        Raises:
            BackendError: there is not enough memory, with both numbers.
        """

    def allocate_host(self, size: int) -> HostMemory:
        """Allocates host memory; raises as ``allocate`` does."""

    def event(self) -> Event:
        """Returns a new event."""

    def upload(self, source: npt.NDArray[Any], address: int) -> None:
        """Enqueues a copy of an array in ``HostMemory`` to the device."""

    def download(self, address: int, target: npt.NDArray[Any]) -> None:
        """Enqueues a copy from the device into an array in ``HostMemory``."""

    def synchronize(self) -> None:
        """Waits for all work of the GPU, of any queue."""

    def zero(self, address: int, size: int) -> None:
        """Enqueues filling with zeros."""

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        """Enqueues a copy of ``rows`` rows of ``width`` bytes within the device; a pitch is the bytes between rows."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` enqueues, without running it.

        Raises:
            BackendError: a part of it cannot be recorded; the queue is as it was.
        """

    def release(self, resources: Iterable[Resource]) -> None:
        """Frees resources after the work that was enqueued before, now or once no capture is going on.

        May be called by a finalizer, in any thread, entered or not.
        """


@contextmanager
def released_on_failure(device: Device, resources: Iterable[Resource]) -> Iterator[None]:
    """Releases ``resources``, which may grow meanwhile, where the block fails."""
    try:
        yield
    except BaseException:
        device.release(resources)
        raise


def require_no_threads(backend: str, threads: int | None) -> None:
    """Raises an ``OptionError`` if ``threads``, which are for a CPU, are given to a backend on a GPU."""
    if threads is not None:
        raise OptionError(f"backend {backend} computes on the GPU: leave out threads={threads}")
