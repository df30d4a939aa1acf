"""What ``runtime.backends.cuda`` gives back, when and in which thread, with the real PyCUDA and cuda-bindings.

On the driver of this folder, which counts what is alive; ``test_device`` says what that proves.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from .devices import there_and_back
from .driver_reports import Driver
from .threads import in_threads

NO_DEVICE = 100


def things(device: Any) -> list[Any]:
    """One of each kind."""
    with device:
        return [device.allocate(10), device.allocate_host(10), device.event(), device.capture(lambda: None)]


LEFT = {"device bytes": 10, "host bytes": 10, "streams": 1, "events": 1, "executables": 1, "retains": 1}


def test_a_device_is_given_back_in_any_thread(new: Callable[[], Any], driver: Driver) -> None:
    devices = [new(), new()]
    devices.pop()
    assert driver.alive() == {"streams": 1, "retains": 1}
    in_threads(devices.clear)
    assert driver.alive() == {"retains": 1}


def test_a_device_of_another_thread_is_given_back(new: Callable[[], Any], driver: Driver) -> None:
    devices: list[Any] = []
    in_threads(lambda: devices.append(new()))
    there_and_back(devices[0], 1)
    devices.clear()
    assert driver.alive() == {"retains": 1}


def test_what_is_dropped_in_another_thread_is_freed(new: Callable[[], Any], driver: Driver) -> None:
    """As where an error came before somebody took it."""
    device = new()
    held = things(device)
    assert driver.alive() == LEFT
    in_threads(held.clear)
    assert driver.alive() == {"streams": 1, "retains": 1}


def test_what_is_released_is_freed_once(new: Callable[[], Any], driver: Driver) -> None:
    device = new()
    held = things(device)
    in_threads(lambda: device.release(held))
    device.release(held)
    assert driver.alive() == {"streams": 1, "retains": 1}


def test_a_device_lives_as_long_as_what_was_made_with_it(new: Callable[[], Any], driver: Driver) -> None:
    device = new()
    with device:
        event = device.event()
        del device
        gc.collect()
        event.record()
        event.wait()


def test_memory_is_freed_after_the_work_that_uses_it(new: Callable[[], Any], driver: Driver) -> None:
    device = new()
    with device:
        memory, host = device.allocate(10), device.allocate_host(10)
        device.zero(memory.address, 10)
        device.download(memory.address, host.array)
    device.release([memory, host])
    assert driver.take_complaints() == []


@pytest.mark.parametrize("where", ["in the thread that captures", "in another thread"])
@pytest.mark.parametrize("whose", ["of the device that captures", "of another device"])
def test_what_is_released_while_a_thread_captures_is_freed_after_it(
    new: Callable[[], Any], driver: Driver, where: str, whose: str
) -> None:
    """A model may be collected in any thread at any time. An unsafe call of a thread spoils what it captures, and
    waiting for a stream spoils what anybody captures of it."""
    device, other = new(), new()
    owner = device if whose == "of the device that captures" else other
    held = things(owner)

    def work() -> None:
        def drop() -> None:
            owner.release(held)
            held.clear()

        drop() if where == "in the thread that captures" else in_threads(drop)
        assert driver.alive()["device bytes"] == 10

    with device:
        graph = device.capture(work)
        assert driver.alive() == {"streams": 2, "executables": 1, "pushed": 1, "retains": 1}
        graph.replay()
        device.synchronize()
        device.release([graph])


def test_another_thread_releases_at_any_moment(new: Callable[[], Any], driver: Driver) -> None:
    """After each line of ours in turn, while a first thread frees what it released."""
    device, lines, moment = new(), 0, 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if "/runtime/backends/cuda/" in frame.f_code.co_filename and event == "line":
            if lines == moment:
                in_threads(lambda: device.release([]))
            lines += 1
        return trace

    before = sys.gettrace()
    while lines >= moment:
        with device:
            held = [device.event() for _ in range(2)]
        lines = 0
        sys.settrace(trace)
        try:
            device.release(held)
        finally:
            sys.settrace(before)
        moment += 1
    assert moment > 20
    held.clear()
    assert driver.alive() == {"streams": 1, "retains": 1}


# Processes ----------------------------------------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess[str]:
    begin = "import ctypes, sys\ndriver = ctypes.CDLL('libcuda.so.1')\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=False)


REFUSED = """
from runtime.errors import BackendError
from runtime.backends.cuda.pycuda import PyCudaDevice
try:
    {}
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_no_gpu_is_one_line(name: str) -> None:
    code = f"driver.fake_fail(b'{name}', 1, {NO_DEVICE}, 1)" + REFUSED.format("PyCudaDevice()")
    result = run(code)
    assert result.stdout == f"no GPU can be used: {name} failed: no CUDA-capable device is detected\n", result.stderr
    assert result.stderr == ""


def test_a_process_ends_quietly_with_what_it_has() -> None:
    result = run(
        "from runtime.backends.cuda.pycuda import PyCudaDevice\n"
        "device = PyCudaDevice()\n"
        "with device:\n"
        "    kept = [device.allocate(10), device.allocate_host(10), device.event(), device.capture(lambda: None)]\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_without_cuda_bindings_there_are_no_graphs() -> None:
    result = run(
        "sys.modules['cuda'] = None\n"
        "from runtime.backends.cuda.pycuda import PyCudaDevice\n"
        "print(PyCudaDevice().has_graphs)\n"
    )
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_a_driver_that_is_too_old_for_graphs_is_one_line() -> None:
    capture = "device = PyCudaDevice()\n    with device: device.capture(lambda: None)"
    result = run("driver.fake_hide(b'cuGraphInstantiateWithFlags')" + REFUSED.format(capture))
    assert result.stdout == "CUDA graph: function cuGraphInstantiateWithFlags is not found\n", result.stderr
