"""The trial of the operators' kernels: the library's own, compiled for a CPU, on a device in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runtime.backends.plugin_library import VARIABLE
from runtime.doctor.kernel_trials import PROBLEMS, kernels
from runtime.errors import BackendError

from ...plugins_trt.kernels import Kernels, build_for_cpu
from ..backends.tensorrt.host_device import HostDevice
from .conftest import MakeLibrary

Change = Callable[[Any], object]


class Library:
    """The entries, in the queue of a device in host memory.

    Args:
        change: what is done to the parameters before a kernel reads them. What it returns is kept for the call.
    """

    def __init__(self, device: HostDevice, kernels: Kernels, change: Change = lambda params: None) -> None:
        self._device, self._kernels, self._change = device, kernels, change

    def __getattr__(self, name: str) -> Callable[..., int]:
        entry: Callable[..., int] = getattr(self._kernels.library, name)
        if name.endswith("Workspace"):
            return entry

        def enqueue(params: Any, stream: ctypes.c_void_p) -> int:
            copy = type(params._obj).from_buffer_copy(params._obj)

            def compute() -> None:
                kept = self._change(copy)
                assert entry(ctypes.byref(copy), stream) == 0, kept

            self._device.enqueue(compute)
            return 0

        return enqueue


@pytest.fixture
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    kernels.emulate()
    return kernels


def test_right_kernels_agree(on_cpu: Kernels) -> None:
    device = HostDevice()
    assert kernels(device, Library(device, on_cpu)) == len(PROBLEMS) == 2 * 3 * 4  # type: ignore[arg-type]
    assert not device.live


def flip_mask(params: Any) -> object:
    flipped = ~np.ctypeslib.as_array((ctypes.c_bool * params.rows).from_address(params.visualMask))
    params.visualMask = flipped.ctypes.data
    return flipped


def only_moe_is_wrong(params: Any) -> None:
    if hasattr(params, "visualGateUp"):
        params.visualGateUp = params.textGateUp


def only_linear_is_wrong(params: Any) -> None:
    if hasattr(params, "visual"):
        params.visual = params.text


def scale_is_left_out(params: Any) -> object:
    """The quantized matrices of ExpertLinear get a scale of 1 for all rows."""
    if not hasattr(params, "text") or not params.text.scale:
        return None
    ones = np.ones(params.out, np.float32)
    params.text.scale = ones.ctypes.data
    return ones


def last_row_is_left_out(params: Any) -> None:
    params.rows -= params.rows > 90


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (flip_mask, "FusedMoE, float, 48 text and 0 visual rows, sizes 128 and 192: 5,"),
        (only_moe_is_wrong, "FusedMoE, float, 60 text and 36 visual rows, sizes 128 and 192: 4,"),
        (only_linear_is_wrong, "ExpertLinear, float, 60 text and 36 visual rows, sizes 128 and 192: 6,"),
        (scale_is_left_out, "ExpertLinear, W8A16, 48 text and 0 visual rows, sizes 128 and 192: 9,"),
        (last_row_is_left_out, "FusedMoE, float, 60 text and 36 visual rows, sizes 128 and 192: 128 of 12,288"),
    ],
)
def test_a_kernel_that_is_wrong_is_named(on_cpu: Kernels, change: Change, problem: str) -> None:
    device = HostDevice()
    with pytest.raises(BackendError) as told:
        kernels(device, Library(device, on_cpu, change))  # type: ignore[arg-type]
    message = str(told.value)
    assert message.startswith(problem)
    assert " numbers differ from float64, by up to " in message
    assert message.endswith("rounding makes at most 0.016: build the library again with: monoedge plugin")
    assert not device.live


def test_a_status_is_named(on_cpu: Kernels) -> None:
    """The workspace is too small, which the kernels' entries refuse before they enqueue anything."""
    device = HostDevice()

    class Refusing(Library):
        def __getattr__(self, name: str) -> Callable[..., int]:
            entry: Callable[..., int] = getattr(on_cpu.library, name)
            return (lambda *sizes: entry(*sizes) - 1) if name.endswith("Workspace") else entry

    with pytest.raises(BackendError, match=r"^FusedMoE, float, 48 text and 0 visual rows, .*: CUDA error 1$"):
        kernels(device, Refusing(device, on_cpu))  # type: ignore[arg-type]
    assert not device.live


def test_an_older_library_is_one_line(make_library: MakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    library = make_library(symbols=("setLoggerFinder", "getCreators", "monoedgeResizeToTiles"))
    monkeypatch.setenv(VARIABLE, str(library))
    with pytest.raises(BackendError) as told:
        kernels(HostDevice())  # type: ignore[arg-type]
    message = str(told.value)
    assert message.startswith(f"{library} has no kernels to try (")
    assert "undefined symbol: monoedgeFusedMoe)" in message
    assert message.endswith("build it again with: monoedge plugin")
    assert "\n" not in message
