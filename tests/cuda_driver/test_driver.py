"""The driver of this folder, through the real cuda-bindings: it says what a real one would punish now and then."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from .driver_reports import Driver


@pytest.fixture
def cuda() -> Iterator[Any]:
    """NVIDIA's bindings, in a context."""
    from cuda.bindings import driver as cuda

    given(cuda.cuInit(0))
    context = given(cuda.cuDevicePrimaryCtxRetain(0))
    given(cuda.cuCtxPushCurrent(context))
    yield cuda
    given(cuda.cuCtxPopCurrent())
    given(cuda.cuDevicePrimaryCtxRelease(0))


def given(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    assert status == 0, status
    return values[0] if values else None


def test_work_waits_for_somebody_who_waits(cuda: Any) -> None:
    stream, event = given(cuda.cuStreamCreate(1)), given(cuda.cuEventCreate(0))
    host, memory = given(cuda.cuMemHostAlloc(16, 0)), given(cuda.cuMemAlloc(16))
    view = (ctypes.c_uint8 * 16).from_address(int(host))
    given(cuda.cuMemsetD8Async(memory, 7, 16, stream))
    given(cuda.cuMemcpyDtoHAsync(host, memory, 16, stream))
    given(cuda.cuEventRecord(event, stream))
    assert set(view) == {0xFF}
    given(cuda.cuEventSynchronize(event))
    assert set(view) == {7}
    given(cuda.cuMemFree(memory))
    given(cuda.cuMemFreeHost(host))
    given(cuda.cuEventDestroy(event))
    given(cuda.cuStreamDestroy(stream))


def test_addresses_are_checked(cuda: Any, driver: Driver) -> None:
    memory, pageable = given(cuda.cuMemAlloc(16)), ctypes.create_string_buffer(16)
    assert cuda.cuMemcpyDtoDAsync(memory, int(memory) + 8, 16, 0)[0] == cuda.CUresult.CUDA_ERROR_INVALID_VALUE
    given(cuda.cuMemcpyHtoDAsync(memory, ctypes.addressof(pageable), 16, 0))
    not_allocated, is_pageable = driver.take_complaints()
    assert not_allocated.startswith("cuMemcpyDtoDAsync_v2: source: 16 bytes at 0x")
    assert is_pageable.endswith("are pageable memory")
    given(cuda.cuCtxSynchronize())
    given(cuda.cuMemFree(memory))


def test_memory_is_not_freed_before_its_work(cuda: Any, driver: Driver) -> None:
    memory = given(cuda.cuMemAlloc(16))
    given(cuda.cuMemsetD8Async(memory, 7, 16, 0))
    given(cuda.cuMemFree(memory))
    assert driver.take_complaints() == ["cuMemFree_v2: freed before work that uses it"]
    given(cuda.cuCtxSynchronize())


def test_a_thread_needs_a_context(cuda: Any, driver: Driver) -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(cuda.cuMemAlloc(16)))
    thread.start()
    thread.join()
    assert answers[0][0] == cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT
    assert driver.take_complaints() == ["cuMemAlloc_v2: no current context"]


def test_an_unsafe_call_spoils_what_its_thread_captures(cuda: Any, driver: Driver) -> None:
    mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    streams = [given(cuda.cuStreamCreate(1)) for _ in range(2)]
    context = given(cuda.cuCtxGetCurrent())

    def elsewhere() -> None:
        given(cuda.cuCtxPushCurrent(context))
        given(cuda.cuMemFree(given(cuda.cuMemAlloc(16))))
        given(cuda.cuCtxPopCurrent())

    for stream in streams:
        given(cuda.cuStreamBeginCapture(stream, mode))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert driver.take_complaints() == []
    given(cuda.cuGraphDestroy(given(cuda.cuStreamEndCapture(streams[0]))))
    assert cuda.cuMemAlloc(16)[0] == cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    assert cuda.cuStreamEndCapture(streams[1])[0] == cuda.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    assert len(driver.take_complaints()) == 1
    for stream in streams:
        given(cuda.cuStreamDestroy(stream))


def test_what_is_left_is_counted(cuda: Any, driver: Driver) -> None:
    memory, stream, event = given(cuda.cuMemAlloc(16)), given(cuda.cuStreamCreate(1)), given(cuda.cuEventCreate(0))
    left = {"device bytes": 16, "streams": 1, "events": 1, "retains": 1, "pushed": 1}
    assert driver.alive() == left
    given(cuda.cuMemFree(memory))
    given(cuda.cuStreamDestroy(stream))
    given(cuda.cuEventDestroy(event))


def test_orders(cuda: Any, driver: Driver) -> None:
    driver.set_memory(100)
    assert given(cuda.cuMemGetInfo()) == 100
    assert cuda.cuMemAlloc(101)[0] == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    driver.fail("cuMemAlloc", 700, call=2)
    memory = given(cuda.cuMemAlloc(1))
    assert cuda.cuMemAlloc(1)[0] == cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    given(cuda.cuMemFree(memory))


def test_a_call_that_is_not_there_says_so(driver: Driver) -> None:
    assert driver.library.cuModuleLoadData(None, None) == 801
    assert driver.take_complaints() == ["cuModuleLoadData: tests/cuda_driver has no such call"]
