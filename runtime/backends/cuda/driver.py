"""Facts about the GPU in this machine, from its driver: neither the CUDA toolkit nor a package is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# From the driver's header, where they are fixed.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Device:
    """Name, compute capability (89 for 8.9), and memory in bytes."""

    name: str
    capability: int
    free_memory: int
    total_memory: int


def find_device() -> Device | None:
    """Returns the first GPU, or None where there is no GPU or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    calls = (
        (driver.cuInit, (0,)),
        (driver.cuDeviceGet, (ctypes.byref(handle), 0)),
        (driver.cuDeviceGetName, (name, len(name), handle)),
        (driver.cuDeviceGetAttribute, (ctypes.byref(major), _MAJOR, handle)),
        (driver.cuDeviceGetAttribute, (ctypes.byref(minor), _MINOR, handle)),
        (driver.cuDevicePrimaryCtxRetain, (ctypes.byref(context), handle)),
    )
    if any(function(*arguments) for function, arguments in calls):
        return None
    try:
        failed = driver.cuCtxPushCurrent_v2(context) or driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(handle)
    if failed:
        return None
    return Device(name.value.decode(errors="replace"), 10 * major.value + minor.value, free.value, total.value)
