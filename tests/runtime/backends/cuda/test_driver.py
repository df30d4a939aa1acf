"""The GPU in this machine, asked through a driver that is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runtime.backends.cuda.driver import Device, _ask


def test_driver_is_asked() -> None:
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
    assert _ask(SimpleNamespace(**calls)) == Device("Orin", 87, 5, 9)
    for broken in ("cuInit", "cuMemGetInfo_v2"):
        assert _ask(SimpleNamespace(**calls | {broken: lambda *_: 100})) is None
