"""The device layer of the TensorRT backend on the real driver: what its code relies on, in the order in which it does.

Without PyCUDA its own calls are not shown; what the layer takes for granted of cuda-bindings still is.
"""

from __future__ import annotations

import importlib.util
import subprocess
import threading
from typing import Any

import numpy as np

from benchmarks.gpu_day.memory import Gpu
from runtime.backends.cuda.driver import find_device
from runtime.console.run import run
from runtime.errors import MonoedgeError

SIZE = 1 << 20


def expect(holds: bool, what: str) -> None:
    """Raises if something does not hold."""
    if not holds:
        raise MonoedgeError(what)


def facts() -> str:
    """``find_device`` against ``nvidia-smi``."""
    device = find_device()
    if device is None:
        raise MonoedgeError("find_device finds no GPU")
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - fixed
    name, capability, memory = (part.strip() for part in told.splitlines()[0].split(","))
    print(device)
    expect(device.name == name, f"find_device names {device.name}, nvidia-smi {name}")
    expect(device.capability == int(capability.replace(".", "")), f"capability {device.capability}, told {capability}")
    # What the driver keeps for itself is counted by one of them.
    distance = abs(device.total_memory / 2**20 - float(memory)) / float(memory)
    expect(distance < 0.05, f"{device.total_memory >> 20} MiB, told {memory}")
    expect(0 < device.free_memory <= device.total_memory, "free memory is not between 0 and all")
    return "find_device agrees with nvidia-smi"


def through_pycuda() -> str:
    """Every call of ``PyCudaDevice``, each result compared on the host."""
    if importlib.util.find_spec("pycuda") is None:
        return "pycuda is not installed, so its calls are not shown"
    from runtime.backends.cuda.pycuda import PyCudaDevice

    device = PyCudaDevice()
    with device:
        source, target, memory = device.allocate_host(SIZE), device.allocate_host(SIZE), device.allocate(SIZE)
        event = device.event()
        event.wait()
        values = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)

        def there_and_back() -> None:
            device.upload(source.array, memory.address)
            device.zero(memory.address + 100, 1000)
            device.copy_rows(memory.address, 64, memory.address + SIZE // 2, 256, 48, 100)
            device.download(memory.address, target.array)

        def check(what: str) -> None:
            event.record()
            event.wait()
            expected = source.array.copy()
            expected[100:1100] = 0
            rows = expected[: 64 * 100].reshape(100, 64)[:, :48].copy()
            expected[SIZE // 2 :][: 256 * 100].reshape(100, 256)[:, :48] = rows
            expect(bool(np.array_equal(target.array, expected)), f"{what}: other bytes came back")

        source.array[:] = values
        there_and_back()
        check("copies")
        resources: list[Any] = [source, target, memory, event]
        if device.has_graphs:
            graph = device.capture(there_and_back)
            resources.append(graph)
            for number in range(3):
                source.array[:] = values + np.uint8(number)
                target.array[:] = 0
                graph.replay()
                check(f"replay {number}")
        device.synchronize()
    device.release(resources)
    return f"pycuda: copies, events{' and graphs' if device.has_graphs else ', no graphs'} give the right bytes"


def through_bindings(gpu: Gpu) -> str:
    """A stream captured, instantiated and replayed by cuda-bindings, while another thread allocates."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return "cuda-bindings is not installed, so graphs are not shown"

    def value(answer: tuple[Any, ...]) -> Any:  # noqa: ANN401 - whatever the call returns
        expect(answer[0] == driver.CUresult.CUDA_SUCCESS, f"cuda-bindings: {answer[0]}")
        return answer[1] if len(answer) > 1 else None

    address = gpu.put(np.zeros(SIZE, np.uint8))
    stream = driver.CUstream(int(value(driver.cuStreamCreate(1))))
    value(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    failures: list[Exception] = []

    def allocate() -> None:
        try:
            Gpu().empty(SIZE)
        except MonoedgeError as error:
            failures.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    value(driver.cuMemsetD8Async(address, 7, SIZE, stream))
    graph = value(driver.cuStreamEndCapture(stream))
    executable = value(driver.cuGraphInstantiate(graph, 0))
    value(driver.cuGraphDestroy(graph))
    expect(not failures, f"another thread cannot allocate during a capture: {failures}")
    expect(not gpu.get(address, SIZE).any(), "a captured call ran at once")
    for _ in range(2):
        gpu.write(np.zeros(SIZE, np.uint8), address)
        value(driver.cuGraphLaunch(executable, stream))
        expect(bool((gpu.get(address, SIZE) == 7).all()), "a replay did not do what was captured")
    value(driver.cuGraphExecDestroy(executable))
    value(driver.cuStreamDestroy(stream))
    return "cuda-bindings: a captured graph replays, and another thread allocates meanwhile"


def main() -> None:
    """Shows one after the other; the last line has all of it."""
    parts = []
    for part in (facts, through_pycuda, lambda: through_bindings(Gpu())):
        parts.append(part())
        print(parts[-1], flush=True)
    print("; ".join(parts))


if __name__ == "__main__":
    run(main)
