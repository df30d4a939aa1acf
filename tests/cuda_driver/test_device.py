"""``runtime.backends.cuda`` with the real PyCUDA and cuda-bindings, on the driver of this folder.

So what is proved is that each call exists, is made as the packages want it, in a thread that has the context, and that
all is given back. What a GPU computes and how long it takes is not.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.driver import find_device
from runtime.errors import BackendError

from .devices import there_and_back
from .driver_reports import MEMORY, Driver
from .threads import in_threads

ILLEGAL_ADDRESS = 700


# Work ----------------------------------------------------------------------------------------------------------------


def test_the_device_and_its_facts(new: Callable[[], Any]) -> None:
    device = new()
    assert (device.name, device.compute_capability, device.has_graphs) == ("memory of the host", 89, True)
    found = find_device()
    assert found is not None
    assert (found.name, found.capability, found.total_memory) == (device.name, 89, MEMORY)


def test_copies_and_zeros(new: Callable[[], Any]) -> None:
    device = new()
    with device:
        memory = device.allocate(1000)
        there, back = device.allocate_host(500), device.allocate_host(1000)
        event = device.event()
        event.wait()  # for nothing, which returns at once
        there.array[:] = np.arange(500) % 251
        device.zero(memory.address, 1000)
        device.upload(there.array, memory.address + 100)
        device.download(memory.address, back.array)
        event.record()
        event.wait()
        np.testing.assert_array_equal(back.array[100:600], there.array)
        assert not back.array[:100].any()
        assert not back.array[600:].any()
        device.release([event, memory, there, back])


def test_rows_have_pitches(new: Callable[[], Any]) -> None:
    device = new()
    with device:
        source, target = device.allocate(1200), device.allocate(4000)
        host = device.allocate_host(4000)
        host.array[:1200] = np.arange(1200) % 251
        device.upload(host.array[:1200], source.address)
        device.zero(target.address, 4000)
        device.copy_rows(source.address, 300, target.address + 16, 1000, width=100, rows=4)
        back = device.allocate_host(4000)
        device.download(target.address, back.array)
        device.synchronize()
        expected = np.zeros((4, 1000), np.uint8)
        expected[:, 16:116] = host.array[:1200].reshape(4, 300)[:, :100]
        np.testing.assert_array_equal(back.array.reshape(4, 1000), expected)
        device.release([source, target, host, back])


def test_a_graph_does_its_work_again(new: Callable[[], Any], driver: Driver) -> None:
    device, launches = new(), driver.done("launches")
    with device:
        memory, there, back = device.allocate(10), device.allocate_host(10), device.allocate_host(10)

        def work() -> None:
            device.upload(there.array, memory.address)
            device.download(memory.address, back.array)

        back.array[:] = 1
        graph = device.capture(work)
        device.synchronize()
        assert set(back.array) == {1}
        for value in (5, 6):
            there.array[:] = value
            graph.replay()
            device.synchronize()
            assert set(back.array) == {value}
        device.release([graph, memory, there, back])
    assert driver.done("launches") == launches + 2


def test_each_thread_enters_by_itself(new: Callable[[], Any]) -> None:
    device = new()
    there_and_back(device, 1)
    in_threads(lambda: there_and_back(device, 2))


def test_several_devices_share_one_context(new: Callable[[], Any], driver: Driver) -> None:
    devices = [new() for _ in range(3)]
    assert len({device.stream for device in devices}) == 3
    assert driver.alive() == {"streams": 3, "retains": 1}
    with devices[0], devices[1]:
        there_and_back(devices[2], 3)
        there_and_back(devices[0], 4)
    del devices[0]
    gc.collect()
    there_and_back(devices[0], 5)


# What cannot be done ------------------------------------------------------------------------------------------------


def test_too_little_memory_names_both_numbers(new: Callable[[], Any], driver: Driver) -> None:
    device = new()
    driver.set_memory(100_000_000)
    with device:
        memory = device.allocate(20_000_000)
        with pytest.raises(BackendError) as caught:
            device.allocate(90_000_000)
        device.release([memory])
    assert str(caught.value) == (
        "90.0 MB of the GPU's memory are needed, 80.0 MB of 100.0 MB are free on memory of the host"
    )


FAILURES = {
    "cuMemAlloc": ("20.0 MB of the GPU's memory cannot be allocated: ", lambda device: device.allocate(20_000_000)),
    "cuMemHostAlloc": ("20.0 MB of host memory cannot be allocated: ", lambda device: device.allocate_host(20_000_000)),
    "cuEventCreate": ("the GPU failed: ", lambda device: device.event()),
    "cuMemsetD8Async": ("filling the GPU's memory failed: ", lambda device: device.zero(0, 1)),
    "cuMemcpy2DAsync": ("copying within the GPU failed: ", lambda device: device.copy_rows(0, 1, 0, 1, 1, 1)),
    "cuMemcpyHtoDAsync": ("copying to the GPU failed: ", lambda device: device.upload(np.zeros(1, np.uint8), 0)),
    "cuMemcpyDtoHAsync": ("copying from the GPU failed: ", lambda device: device.download(0, np.zeros(1, np.uint8))),
    "cuCtxSynchronize": ("the GPU failed: ", lambda device: device.synchronize()),
    "cuEventRecord": ("the GPU failed: ", lambda device: device.event().record()),
    "cuEventSynchronize": ("the GPU failed: ", lambda device: device.event().wait()),
    "cuStreamBeginCapture": ("CUDA graph: ", lambda device: device.capture(lambda: None)),
    "cuStreamEndCapture": ("CUDA graph: ", lambda device: device.capture(lambda: None)),
    "cuGraphInstantiateWithFlags": ("CUDA graph: ", lambda device: device.capture(lambda: None)),
    "cuGraphLaunch": ("CUDA graph: ", lambda device: device.capture(lambda: None).replay()),
    "cuStreamCreate": ("no GPU can be used: ", lambda device: type(device)()),
    "cuDeviceGetName": ("no GPU can be used: ", lambda device: type(device)()),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_call_that_fails_is_one_line(new: Callable[[], Any], driver: Driver, name: str) -> None:
    message, act = FAILURES[name]
    device = new()
    with device:
        driver.fail(name, ILLEGAL_ADDRESS)
        with pytest.raises(BackendError) as caught:
            act(device)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(("an illegal memory access was encountered", "CUDA_ERROR_ILLEGAL_ADDRESS"))
    if name == "cuStreamEndCapture":  # the driver, which did not end it, is asked again
        end_capture(device, driver)


def test_a_context_that_cannot_be_entered_is_one_line(new: Callable[[], Any], driver: Driver) -> None:
    device = new()
    driver.fail("cuCtxPushCurrent", ILLEGAL_ADDRESS)
    with pytest.raises(BackendError, match="the GPU cannot be used: cuCtxPushCurrent failed: an illegal memory"):
        there_and_back(device, 1)
    there_and_back(device, 1)


def end_capture(device: Any, driver: Driver) -> None:
    graph = ctypes.c_void_p()
    with device:
        assert driver.library.cuStreamEndCapture(ctypes.c_void_p(device.stream), ctypes.byref(graph)) == 0
    driver.library.cuGraphDestroy(graph)


def test_what_cannot_be_recorded_leaves_the_queue_usable(new: Callable[[], Any], driver: Driver) -> None:
    device = new()
    with device, pytest.raises(BackendError, match=r"cannot be allocated: .* not permitted when stream is capturing"):
        device.capture(lambda: device.allocate(10))
    assert len(driver.take_complaints()) == 1
    with device, pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 // 0)
    there_and_back(device, 7)
