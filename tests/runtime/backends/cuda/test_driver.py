"""Which chip a plan is built for, and whether there is room: chosen and asked without a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from export.engines.build import require_memory
from export.engines.plan import Options
from export.engines.target import TARGETS, choose_capability
from runtime.backends.cuda.driver import Device, _ask
from runtime.errors import BackendError, OptionError

RTX = TARGETS["trt-rtx"]
TRT = TARGETS["trt"]


def test_chip() -> None:
    assert choose_capability(RTX, None, 89) == 89
    assert choose_capability(RTX, 120, 89) == 120
    assert choose_capability(TRT, None, 87) == 87
    assert choose_capability(TRT, 110, None, build=False) == 110
    with pytest.raises(OptionError, match="TensorRT builds for the GPU at hand, SM 87: leave out --sm 89"):
        choose_capability(TRT, 89, 87)
    with pytest.raises(OptionError, match="does not build for SM 90"):
        choose_capability(RTX, None, 90)


def test_device_memory() -> None:
    options = Options(TRT, 87, 512, 1)
    device = Device("Orin", 87, 3_000_000_000, 8_000_000_000)
    said: list[str] = []
    require_memory(options, device, 2_500, said.append)
    assert said == ["Orin: 3.00 GB of 8.00 GB free for 0.0 MB of weights"]
    with pytest.raises(BackendError, match=r"the weights alone are 4\.00 GB, Orin has 3\.00 GB of 8\.00 GB free"):
        require_memory(options, device, 4_000_000_000, said.append)
    # TensorRT for RTX does not build on the GPU.
    require_memory(replace(options, target=RTX), device, 4_000_000_000, lambda _: None)


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
