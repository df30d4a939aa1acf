"""The GPU's lines, on a driver that this folder compiles (``driver.c``): all but the driver is real.

The kernel that resizes pictures is the library's, compiled for a CPU; the Jetsons are files in a folder.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.backends.tensorrt.pixels import ResizeParams
from runtime.doctor.gpu import Gpu, find_gpu, jetson
from runtime.doctor.gpu_trials import bandwidth, resize
from runtime.errors import BackendError

from ...plugins_trt.preprocess_library import resize_on_cpu
from ..backends.tensorrt.host_device import HostDevice
from .machines import Machine


def test_a_gpu(with_gpu: Machine, driver: Path) -> None:
    report = with_gpu.doctor(DRIVER_FREE="1500")
    assert report.facts["backend"] == "tensorrt"
    status, found, _ = report.said("GPU", "driver")
    assert status == "ok"
    assert found.endswith(f"runs CUDA 13.0 and older, {driver / 'libcuda.so.580.65.06'}")
    assert report.said("GPU", "GPU") == ("ok", "GPU of a test, SM 89, 1.57 of 8.59 GB free", "")
    assert report.said("GPU", "pycuda") == ("missing", "not installed", "pip install pycuda")
    assert report.finding("GPU", "pycuda")["hinders"]
    assert report.said("GPU", "cuda-bindings")[::2] == ("missing", "pip install 'cuda-bindings<14'")
    status, found, _ = report.said("trials on the GPU", "copies")
    assert status == "ok"
    assert found.endswith(" GB/s of the GPU's memory, read and written")
    for kernel in ("resizing a picture", "kernels"):
        assert report.said("trials on the GPU", kernel)[:2] == (
            "wrong",
            "pycuda is not installed; this adds it: pip install pycuda",
        )
    assert report.code == 1
    # A GPU is no reason not to answer on the CPU.
    report = with_gpu.doctor("--backend", "onnxruntime")
    assert (report.code, report.facts["backend"]) == (0, "onnxruntime")


@pytest.mark.parametrize(
    ("variables", "found", "remedy"),
    [
        ({"DRIVER_STATUS": "34"}, "it does not start, CUDA_ERROR_STUB_LIBRARY (34)", "take its folder out of LD_LIB"),
        ({"DRIVER_STATUS": "100"}, "it does not start, CUDA_ERROR_NO_DEVICE (100)", "CUDA_VISIBLE_DEVICES hides some"),
        ({"DRIVER_STATUS": "803"}, "it does not start, CUDA_ERROR_OTHER (803)", "restart the machine"),
        ({"DRIVER_STATUS": "-1"}, "the process that tried it ended with SIGABRT", "install NVIDIA's driver"),
    ],
    ids=str,
)
def test_a_driver_that_does_not_start(
    driver: Path, variables: dict[str, str], found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (variables | {"LD_LIBRARY_PATH": str(driver)}).items():
        monkeypatch.setenv(name, value)
    gpu = find_gpu()
    assert gpu.device is None
    line = gpu.findings[0]
    assert (line.what, line.status) == ("driver", "wrong")
    assert found in line.found
    assert remedy in line.remedy


def test_a_gpu_that_cannot_be_entered(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("DRIVER_CONTEXT", "2")
    gpu = find_gpu()
    assert gpu.device is None
    assert gpu.findings[1].lines("tensorrt") == (
        "! missing  GPU: of 1 GPUs the first cannot be entered\n"
        "           → end what else is using it; nvidia-smi lists that\n"
    )


def test_a_library_that_is_no_driver(gcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"\x7fELF and no more")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    (line,) = find_gpu().findings
    assert line.status == "wrong"
    assert str(tmp_path / "libcuda.so.1") in line.found


@pytest.mark.parametrize(
    ("cuda", "status", "remedy"),
    [
        ("13000", "ok", ""),
        ("12060", "wrong", "pip install 'cuda-bindings<13', or update the driver to one that runs CUDA 13"),
    ],
)
def test_cuda_bindings_of_another_cuda(with_gpu: Machine, cuda: str, status: str, remedy: str) -> None:
    with_gpu.package("cuda-bindings", "13.1.0", "cuda.bindings.driver", code="")
    said = with_gpu.doctor(DRIVER_CUDA=cuda).said("GPU", "cuda-bindings")
    assert (said[0], said[2]) == (status, remedy)
    if status == "wrong":
        assert said[1] == "13.1.0, made for CUDA 13; the driver runs CUDA 12.6 and older"


def test_copies_are_counted_in_both_directions(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 copies of a mebibyte in one second, on a clock of the test's own."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name, load=ctypes.CDLL: load(str(driver / name)))
    ticks = iter([0.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr("runtime.doctor.gpu_trials.time.perf_counter", lambda: next(ticks))
    assert bandwidth() == 2 * 20 * (1 << 20)


class Kernel:
    """The kernel that was compiled for a CPU, in the queue of a device in host memory."""

    def __init__(self, device: HostDevice, entry: Callable[..., int], gray: bool = False) -> None:
        self._device, self._entry, self._gray = device, entry, gray

    def __call__(self, params: Any, stream: ctypes.c_void_p) -> int:
        copy = ResizeParams.from_buffer_copy(params._obj)
        copy.channelStride *= not self._gray
        self._device.enqueue(lambda: self._entry(ctypes.byref(copy), stream))
        return 0


def test_the_kernel_that_resizes_is_held_against_pillow(tmp_path: Path) -> None:
    device = HostDevice()
    entry = resize_on_cpu(tmp_path)
    # 131×90 pixels go into 2×2 tiles of 56, and a thumbnail.
    assert resize(device, Kernel(device, entry)) == 5 * 3 * 56 * 56  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"numbers differ from Pillow's: build the library again"):
        resize(device, Kernel(device, entry, gray=True))  # type: ignore[arg-type]
    assert not device.live


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/meminfo": "MemTotal:        7802048 kB\nMemFree:          203948 kB\nMemAvailable:    5201312 kB\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n",
    "var/lib/nvpmodel/status": "pmode:0002",
    "var/lib/dpkg/status": "Package: nvidia-l4t-core\nVersion: 36.4.3\n\nPackage: nvidia-jetpack\nStatus: install ok\n"
    "Architecture: arm64\nVersion: 6.2+b77\nDepends: x\n\nPackage: other\nVersion: 9\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
}
"""An Orin Nano with JetPack 6.2, as its files say it."""


def test_a_jetson(tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("DRIVER_SM", "87")
    write(tmp_path, ORIN)
    gpu = find_gpu(tmp_path)
    assert gpu.device is not None
    assert gpu.device.capability == 87
    assert {finding.what: finding.found for finding in gpu.findings[2:]} == {
        "Jetson": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "JetPack": "6.2+b77, Jetson Linux 36.4.3",
        "power mode": "2 MAXN_SUPER of 0 15W, 1 25W, 2 MAXN_SUPER",
        "clocks": "GPU 306 to 1020 MHz, not fixed (sudo jetson_clocks does it, for builds and measurements)",
        "memory": "7.99 GB that CPU and GPU share, 5.33 GB available (sudo init 3 frees what the desktop takes)",
    }


def test_a_jetson_that_was_set_up_otherwise(tmp_path: Path) -> None:
    """No mode was ever chosen, the clocks are fixed, JetPack's packages are not installed."""
    write(tmp_path, ORIN)
    for name in ("var/lib/nvpmodel/status", "var/lib/dpkg/status"):
        (tmp_path / name).unlink()
    (tmp_path / "sys/class/devfreq/17000000.gpu/min_freq").write_text("1020000000\n")
    found = {finding.what: finding for finding in jetson(Gpu(jetson="a Jetson"), tmp_path)}
    assert found["power mode"].found == "1 25W of 0 15W, 1 25W, 2 MAXN_SUPER"
    assert found["clocks"].found == "GPU 1020 to 1020 MHz, fixed"
    assert found["JetPack"].status == "missing"
    assert found["JetPack"].remedy.startswith("sudo apt install nvidia-jetpack")
    # Nothing at all is known of a board that has none of these files.
    bare = {finding.what: finding.found for finding in jetson(Gpu(jetson="a Jetson"), tmp_path / "nowhere")}
    assert bare["power mode"] == "unknown (sudo nvpmodel -q tells it)"
    assert "memory" not in bare


@pytest.mark.parametrize("model", ["", "Raspberry Pi 5 Model B\0"])
def test_what_is_no_jetson(tmp_path: Path, model: str) -> None:
    write(tmp_path, {"proc/device-tree/model": model})
    assert find_gpu(tmp_path).jetson == ""
