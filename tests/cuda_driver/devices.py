"""PyCUDA's device, which only a process on the driver of this folder can import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def new() -> Callable[[], Any]:
    """Makes a device."""
    from runtime.backends.cuda.pycuda import PyCudaDevice

    return PyCudaDevice


def there_and_back(device: Any, value: int) -> None:
    """Copies bytes to the device, within it and back."""
    with device:
        there, back = device.allocate_host(100), device.allocate_host(100)
        memory, event = device.allocate(200), device.event()
        there.array[:] = value
        device.upload(there.array, memory.address)
        device.copy_rows(memory.address, 10, memory.address + 100, 10, width=10, rows=10)
        device.download(memory.address + 100, back.array)
        event.record()
        event.wait()
        assert set(back.array) == {value}
        device.release([event, memory, there, back])
