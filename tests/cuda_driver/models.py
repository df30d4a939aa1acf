"""Models on PyCUDA's device, whose engines ONNX Runtime computes as host functions of the stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime

from ..runtime.backends.tensorrt.host_model import open_on_engines
from ..runtime.images.test_frames import Enqueued
from ..runtime.test_golden import GOLDEN
from .driver_reports import Driver

PICTURE = GOLDEN / "images/portrait.png"
QUESTION = "What is written here?"

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_functions: list[Any] = []
"""All that were enqueued in this process: graphs and the queue have their addresses only."""


class Executor:
    """Lets engines compute in the stream of a device."""

    def __init__(self, stream: int, failures: list[BaseException]) -> None:
        self._driver, self.stream, self._failures = Driver(), stream, failures

    def require_entered(self) -> None:
        """The driver says it."""

    def enqueue(self, work: Callable[[], None]) -> None:
        def run(_: object) -> None:
            try:
                work()
            except BaseException as error:  # which the driver's C could not pass on
                self._failures.append(error)

        _functions.append(_FUNCTION(run))
        status = self._driver.library.cuLaunchHostFunc(ctypes.c_void_p(self.stream), _functions[-1], None)
        assert status == 0, status

    def at(self, address: int, size: int) -> np.ndarray:
        assert self._driver.is_allocated(address, size), f"{size} bytes at {address} are not allocated"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@pytest.fixture
def open_model() -> Iterator[Callable[..., runtime.Model]]:
    """Opens a bundle, with the kernel for pictures in device memory if it gets a folder to compile that in.

    What engines found wrong while they computed fails the test at its end.
    """
    from runtime.backends.cuda.pycuda import PyCudaDevice

    failures: list[BaseException] = []

    def open_model(bundle: Path, kernel: Path | None = None) -> runtime.Model:
        device = PyCudaDevice()
        executor = Executor(device.stream, failures)
        if kernel is None:
            return open_on_engines(bundle, device, executor)
        return open_on_engines(bundle, device, executor, open_resize=lambda: Enqueued(executor, kernel))

    yield open_model
    _functions.clear()
    assert failures == []


def ask(model: runtime.Model, question: str, tokens: int = 8, picture: Path | None = PICTURE) -> str:
    session = model.session(picture or (), question, max_tiles=1, max_new_tokens=tokens)
    text = session.text
    assert text is not None
    return text
