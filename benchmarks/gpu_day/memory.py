"""Memory for calls of the kernels: on the GPU, through its driver and no package, or on the host for emulated ones."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from runtime.errors import MonoedgeError
from tests.plugins_trt.kernels import POISON, aligned, guards_hold, placed


class Gpu:
    """Memory of the first GPU, in its primary context, which the kernels' CUDA runtime shares.

    Each tensor is an allocation of its own, so that ``compute-sanitizer`` sees where it ends.
    """

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise MonoedgeError("there is no libcuda.so.1 here, which NVIDIA's driver brings") from None
        self._addresses: list[int] = []
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - ctypes' values of all kinds
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise MonoedgeError(f"{name}: {text.value.decode() if text.value else f'CUDA error {status}'}")

    def empty(self, size: int, poisoned: bool = True) -> int:
        """Allocates and returns the address. Without poison nothing is written, so that ``initcheck`` sees reads."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._addresses.append(address.value)
        if poisoned:
            self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(POISON), ctypes.c_size_t(size))
        return address.value

    def put(self, array: np.ndarray) -> int:
        """Copies an array into memory of its own, and returns the address."""
        address = self.empty(array.nbytes, poisoned=False)
        self.write(array, address)
        return address

    def write(self, array: np.ndarray, address: int) -> None:
        """Copies an array to an address."""
        source = np.ascontiguousarray(array)
        place = ctypes.c_void_p(source.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), place, ctypes.c_size_t(source.nbytes))

    def synchronize(self) -> None:
        """Waits for the GPU; what a kernel did wrong is told here."""
        self._call("cuCtxSynchronize")

    def get(self, address: int, size: int) -> np.ndarray:
        """Waits for the GPU and copies bytes from it."""
        self.synchronize()
        target = np.empty(size, np.uint8)
        place = ctypes.c_void_p(target.ctypes.data)
        self._call("cuMemcpyDtoH_v2", place, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return target

    def clear(self) -> None:
        """Frees everything."""
        while self._addresses:
            self._call("cuMemFree_v2", ctypes.c_uint64(self._addresses.pop()))


class Host:
    """The same on the host, guarded, for a library whose kernels are emulated."""

    def __init__(self) -> None:
        self._arrays: dict[int, np.ndarray] = {}

    def empty(self, size: int, poisoned: bool = True) -> int:
        """Allocates; always poisoned."""
        array = aligned(size)
        self._arrays[array.ctypes.data] = array
        return array.ctypes.data

    def put(self, array: np.ndarray) -> int:
        """Copies."""
        held = placed(array).reshape(-1).view(np.uint8)
        self._arrays[held.ctypes.data] = held
        return held.ctypes.data

    def write(self, array: np.ndarray, address: int) -> None:
        """Copies to an address, which may lie inside of an allocation."""
        source = np.ascontiguousarray(array)
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def synchronize(self) -> None:
        """Needs nothing."""

    def get(self, address: int, size: int) -> np.ndarray:
        """Copies back."""
        return self._arrays[address][:size].copy()

    def clear(self) -> None:
        """Frees everything.

        Raises:
            MonoedgeError: something was written outside of an array.
        """
        arrays, self._arrays = self._arrays, {}
        if not all(guards_hold(array) for array in arrays.values()):
            raise MonoedgeError("something was written outside of a tensor")
