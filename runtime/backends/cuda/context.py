"""The context of the GPU through PyCUDA, and the order in which things of it are freed.

PyCUDA frees a thing with its Python object. It needs the context for that, and where a thread collects the object
without one, PyCUDA warns and the thing stays. So what we make is freed by ``release``, whichever thread that is in.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from runtime.backends.cuda.device import Resource
from runtime.errors import BackendError, as_backend_error

try:
    import pycuda.driver
except ImportError as error:
    if error.name == "pycuda":
        raise BackendError("pycuda is not installed; this adds it: pip install pycuda") from None
    raise BackendError(f"pycuda cannot be imported: {error}; it needs NVIDIA's driver and a GPU") from None

cuda = pycuda.driver

Stream = list[Any]
"""PyCUDA's stream, or nothing once it is freed: whoever holds the list does not keep the stream."""

_making = threading.Lock()
_contexts: list[Any] = []

_released: deque[tuple[Stream, Resource]] = deque()
_freeing = threading.Lock()
"""Held by the thread that frees or captures: freeing may wait, which would spoil a capture of the same thread, and
waiting for a stream that another thread captures would spoil that."""


def primary_context() -> Any:  # noqa: ANN401 - PyCUDA's
    """Returns the primary context of the first GPU, which TensorRT, PyTorch and other libraries of the process share.

    It is retained once a process and never given back: PyCUDA's destructor would detach it by a call that is for other
    contexts, and leave it pushed.

    Raises:
        BackendError: there is no GPU, or it cannot be used.
    """
    # Looked at without the lock first: a finalizer may come while this thread holds it.
    if not _contexts:
        with _making, as_backend_error("no GPU can be used", cuda.Error):
            if not _contexts:
                cuda.init()
                context = cuda.Device(0).retain_primary_context()
                # One reference more than there are, so that the end of the interpreter does not collect it either.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
                _contexts.append(context)
    return _contexts[0]


def enter() -> None:
    """Makes the context current in this thread, until ``leave``.

    Raises:
        BackendError: there is no GPU, or it cannot be used.
    """
    context = primary_context()
    with as_backend_error("the GPU cannot be used", cuda.Error):
        context.push()


def leave() -> None:
    """Makes current in this thread what was so before ``enter``."""
    cuda.Context.pop()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Within it nothing is freed, in any thread; what is released meanwhile is freed at its end."""
    try:
        with _freeing:
            yield
    finally:
        _free()


class Owned:
    """Something of the driver's, which is freed once: by hand, or with the object that stands for it.

    Args:
        owner: that object.
        stream: whose work may use it.
        free: frees it; the context is current.
        at_exit: whether the end of the interpreter frees it too.
    """

    def __init__(self, owner: object, stream: Stream, free: Callable[[], object], at_exit: bool = False) -> None:
        self._free = [free]
        self._finalizer = weakref.finalize(owner, release, stream, [self])
        self._finalizer.atexit = at_exit

    def free(self) -> None:
        """Frees it unless it is freed."""
        self._finalizer.detach()
        for free in self._free:
            free()
        self._free.clear()


def release(stream: Stream, resources: Iterable[Resource]) -> None:
    """Frees resources once the stream has done its work, now or when no thread captures; finalizers may call it."""
    _released.extend((stream, resource) for resource in resources)
    _free()


def _free() -> None:
    # A thread that holds the lock looks again when it has given it back: a finalizer that comes meanwhile, in that
    # thread or another, need not wait.
    while _released and _freeing.acquire(blocking=False):
        try:
            enter()
            try:
                while _released:
                    stream, resource = _released.popleft()
                    _wait(stream)
                    resource.free()
            finally:
                leave()
        finally:
            _freeing.release()


def _wait(stream: Stream) -> None:
    # An error of the work is reported to who waits for its answer.
    with contextlib.suppress(cuda.Error):
        for opened in stream:
            opened.synchronize()
