"""The GPU in this machine, asked through a driver that is none."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.backends.cuda.driver import Device, find_device


def test_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(value: Any, which: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[which]
        return 0

    def memory(free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 5, 9
        return 0

    def name(text: Any, size: int, device: Any) -> int:
        text.value = b"Orin"
        return 0

    calls = {
        call: lambda *_: 0 for call in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2")
    }
    calls |= {call: lambda *_: 0 for call in ("cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2")}
    calls |= {"cuDeviceGetName": name, "cuDeviceGetAttribute": attribute, "cuMemGetInfo_v2": memory}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**calls))
    assert find_device() == Device("Orin", 87, 5, 9)
    for broken in ("cuInit", "cuMemGetInfo_v2"):
        with monkeypatch.context() as patch:
            patch.setitem(calls, broken, lambda *_: 100)
            assert find_device() is None
