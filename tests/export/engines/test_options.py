"""Which chip a plan is built for, and whether there is room: chosen without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from export.engines.build import require_memory
from export.engines.options import Options, choose_capability
from runtime.backends.cuda.driver import Device
from runtime.bundle.targets import TARGETS
from runtime.console.console import SILENT, Console
from runtime.errors import BackendError, OptionError

RTX = TARGETS["trt-rtx"]
TRT = TARGETS["trt"]


class Told(Console):
    """Keeps the lines that are said."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(shows=False)
        self.lines = lines

    def say(self, line: str) -> None:
        self.lines.append(line)


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
    require_memory(options, device, 2_500, Told(said))
    assert said == ["Orin: 3.00 GB of 8.00 GB free for 0.0 MB of weights"]
    with pytest.raises(BackendError, match=r"the weights alone are 4\.00 GB, Orin has 3\.00 GB of 8\.00 GB free"):
        require_memory(options, device, 4_000_000_000, Told(said))
    # TensorRT for RTX does not build on the GPU.
    require_memory(replace(options, target=RTX), device, 4_000_000_000, SILENT)
