"""TensorRT, the plugin library and LD_LIBRARY_PATH. What stands for TensorRT's module and library is made here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime.backends.plugin_library import VARIABLE
from runtime.doctor.gpu import Gpu
from runtime.doctor.libraries import search_path, toolkit
from runtime.doctor.plugin import plugin
from runtime.doctor.report import MISSING, OK, WRONG, Finding

from .conftest import MakeLibrary
from .machines import Machine

TENSORRT = """
import ctypes

ctypes.CDLL({library!r})
__version__ = {version!r}

class ILogger:
    pass
"""


@pytest.fixture
def nvinfer(gcc: str, tmp_path: Path) -> Path:
    """A library that says that it is TensorRT 10.15.1."""
    source, library = tmp_path / "nvinfer.c", tmp_path / "libnvinfer.so.10"
    source.write_text("int getInferLibVersion(void) { return 101501; }\n")
    subprocess.run([gcc, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def test_module_and_library_of_one_version(with_gpu: Machine, nvinfer: Path) -> None:
    code = TENSORRT.format(library=str(nvinfer), version="10.15.1.29")
    with_gpu.package("tensorrt-cu13", "10.15.1.29", "tensorrt", code)
    report = with_gpu.doctor()
    status, found, _ = report.said("TensorRT", "tensorrt")
    assert status == "ok"
    assert found.startswith("TensorRT 10.15.1.29 (10.15 and later have all that bundles use")
    assert found.endswith(f", {nvinfer}")
    # The same for a driver that runs no CUDA 13, which this package is made for.
    status, found, remedy = with_gpu.doctor(DRIVER_CUDA="12060").said("TensorRT", "tensorrt")
    assert status == "wrong"
    assert found.endswith(", made for CUDA 13; the driver runs CUDA 12.6 and older")
    assert remedy == "update the driver to one that runs CUDA 13"


def test_a_tensorrt_that_is_too_old(with_gpu: Machine, gcc: str, tmp_path: Path) -> None:
    """That of JetPack 5, whose library counts otherwise."""
    source, library = tmp_path / "nvinfer.c", tmp_path / "libnvinfer.so.8"
    source.write_text("int getInferLibVersion(void) { return 8502; }\n")
    subprocess.run([gcc, "-shared", "-fPIC", source, "-o", library], check=True)
    with_gpu.package("tensorrt", "8.5.2.2", "tensorrt", TENSORRT.format(library=str(library), version="8.5.2.2"))
    status, found, remedy = with_gpu.doctor().said("TensorRT", "tensorrt")
    assert (status, found) == ("wrong", "TensorRT 8.5.2.2; expected 10.3 or later")
    assert remedy == "on Jetson update JetPack, elsewhere TensorRT"


def test_a_module_that_loads_the_library_of_another_version(with_gpu: Machine, nvinfer: Path) -> None:
    code = TENSORRT.format(library=str(nvinfer), version="10.3.0")
    with_gpu.package("tensorrt", "10.3.0", "tensorrt", code)
    status, found, remedy = with_gpu.doctor().said("TensorRT", "tensorrt")
    assert (status, found) == ("wrong", f"tensorrt 10.3.0 loads {nvinfer}, which is 10.15.1")
    assert remedy == "take that file's folder out of LD_LIBRARY_PATH, or install the module of that version"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os; os.abort()", "the process that tried it ended with SIGABRT"),
        (
            "import no_such_thing",
            "tensorrt cannot be imported: No module named 'no_such_thing'; on Jetson it comes with",
        ),
    ],
)
def test_a_tensorrt_that_fails(with_gpu: Machine, code: str, found: str) -> None:
    with_gpu.package("tensorrt", "10.3.0", "tensorrt", code)
    said = with_gpu.doctor().said("TensorRT", "tensorrt")
    assert said[0] == "wrong"
    assert said[1].startswith(found)


def test_no_tensorrt(with_gpu: Machine) -> None:
    status, found, remedy = with_gpu.doctor().said("TensorRT", "TensorRT")
    assert (status, found) == ("missing", "neither tensorrt nor tensorrt_rtx is installed")
    assert "; TensorRT for RTX: this installs it: pip install tensorrt-rtx-cu13" in remedy


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def trapped(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> list[Finding]:
    monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(map(str, folders)))
    return list(search_path(Gpu(cuda=(12, 6)), {"tensorrt": "10.3.0"}))


def test_folders_that_hide_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = touch(tmp_path / "cuda/lib64/stubs", "libcuda.so", "libnvidia-ml.so")
    other = touch(tmp_path / "TensorRT-10.15.1.29/lib", "libnvinfer.so.10", "libnvinfer.so.10.15.1")
    newer = touch(tmp_path / "cuda-13.0/lib64", "libcudart.so.13")
    good = touch(tmp_path / "driver", "libcuda.so", "libcuda.so.1", "libcuda.so.580.65.06", "libnvinfer.so.10.3.0")
    tegra = touch(tmp_path / "tegra", "libcuda.so.1", "libcuda.so.1.1", "libcudart.so.12")
    lines = trapped(monkeypatch, stubs, good, other, newer, tegra, tmp_path / "nowhere")
    assert {line.status for line in lines} == {WRONG}
    assert [line.found for line in lines] == [
        f"{stubs} has libcuda.so, but not the driver's: a stub to link with, or a copy",
        f"{other} has libnvinfer.so.10.15.1, the module tensorrt is 10.3.0",
        f"{newer} has libcudart.so.13, the driver runs CUDA 12.6 and older",
    ]
    rest = ":".join(map(str, (good, other, newer, tegra, tmp_path / "nowhere")))
    assert lines[0].remedy == f"export LD_LIBRARY_PATH={rest}"
    (line,) = trapped(monkeypatch, good, tegra)
    assert line.status == OK
    (line,) = trapped(monkeypatch, stubs)
    assert line.remedy == "unset LD_LIBRARY_PATH"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", OK),
        ("Cuda compilation tools, release 12.2, V12.2.140", WRONG),
        (None, MISSING),
    ],
)
def test_nvcc(said: str | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("runtime.doctor.libraries.DEFAULT_NVCC", str(tmp_path / "no-nvcc"))
    if said is not None:
        (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "nvcc").chmod(0o755)
    found = toolkit()
    assert found.status == status
    assert not found.hinders("tensorrt")


def looked_at(library: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None = None) -> list[Finding]:
    monkeypatch.setenv(VARIABLE, str(library))
    return list(plugin(gpu or Gpu(), {}, {}))


def test_a_library_with_code_for_a_chip(
    make_library: MakeLibrary, with_gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(87, 89)
    loads, code = looked_at(library, monkeypatch)
    assert loads.found == f"{library} loads"
    assert code.found == "SM 87, SM 89; no GPU is here to compare it with"
    report = with_gpu.doctor(**{VARIABLE: str(library)})
    assert report.said("plugin library", "code for GPUs") == ("ok", "SM 87, SM 89; this GPU is SM 89", "")
    report = with_gpu.doctor(**{VARIABLE: str(library), "DRIVER_SM": "120"})
    assert report.said("plugin library", "code for GPUs")[:2] == (
        "wrong",
        f"{library} has no code for SM 120, only for SM 87, 89: build it with: monoedge plugin --arch 120 -o {library}",
    )
    assert report.finding("plugin library", "code for GPUs")["hinders"]


@pytest.mark.parametrize(
    ("body", "symbols", "found"),
    [
        (
            "",
            ("getCreators",),
            "{} has no setLoggerFinder, monoedgeResizeToTiles, monoedgeFusedMoe, monoedgeFusedMoeWorkspace, "
            "monoedgeExpertLinear, monoedgeExpertLinearWorkspace: it is another library, or an older one",
        ),
        ("int nowhere(void); int f(void) { return nowhere(); }", ("getCreators",), "undefined symbol: nowhere"),
        (
            "#include <stdlib.h>\n__attribute__((constructor)) static void dies(void) { abort(); }",
            ("getCreators",),
            "{}: the process that tried it ended with SIGABRT",
        ),
    ],
    ids=["lacks", "undefined", "dies"],
)
def test_a_library_that_cannot_be_used(
    make_library: MakeLibrary, body: str, symbols: Sequence[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(body=body, symbols=symbols)
    (line,) = looked_at(library, monkeypatch)
    assert (line.status, line.remedy) == (WRONG, f"build it again with: monoedge plugin -o {library}")
    assert found.format(library) in line.found
    assert "\n" not in line.found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: b"", "is no library"),
        (lambda data: b"#!/bin/sh\n" + bytes(99), "is no library"),
        (lambda data: data[: len(data) // 2], ": "),
        (lambda data: data[:18] + (243).to_bytes(2, "little") + data[20:], "is for another processor, this is "),
    ],
    ids=["empty", "text", "half", "RISC-V"],
)
def test_a_file_that_is_no_library(
    make_library: MakeLibrary, change: object, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library()
    library.write_bytes(change(library.read_bytes()))  # type: ignore[operator]
    (line,) = looked_at(library, monkeypatch)
    assert line.status == WRONG
    assert line.found.startswith(f"{library}")
    assert found in line.found


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = looked_at(tmp_path / "nowhere.so", monkeypatch)
    assert line.status == MISSING
    assert line.found.endswith(", which is no file: correct it, or build with: monoedge plugin")


def test_the_real_library_in_the_real_tensorrt(equipped: Machine, library: Path) -> None:
    """It registers where there is no GPU; one with other functions of these names does not."""
    pytest.importorskip("tensorrt_rtx")
    equipped.install("tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings", "tensorrt_rtx_cu13")
    report = equipped.doctor(**{VARIABLE: str(library)})
    status, found, _ = report.said("plugin library", "plugins in tensorrt_rtx")
    assert status == "ok"
    assert found.startswith("TensorRT for RTX 1.7")
    assert "takes FusedMoE, FusedMoETextW8A16" in found
    assert report.code == 0


def test_another_library_in_the_real_tensorrt(equipped: Machine, make_library: MakeLibrary) -> None:
    pytest.importorskip("tensorrt_rtx")
    equipped.install("tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings", "tensorrt_rtx_cu13")
    report = equipped.doctor(**{VARIABLE: str(make_library(89))})
    status, found, remedy = report.said("plugin library", "plugins in tensorrt_rtx")
    assert status == "wrong"
    assert "cannot load the plugin library" in found
    assert remedy.startswith("build it again with: monoedge plugin")


def test_a_library_that_hangs(make_library: MakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is ended."""
    monkeypatch.setattr("runtime.doctor.children.LIMIT_S", 3)
    library = make_library(
        body="#include <unistd.h>\n__attribute__((constructor)) static void hangs(void) { pause(); }"
    )
    (line,) = looked_at(library, monkeypatch)
    assert (line.status, line.found) == (WRONG, f"{library}: the process that tried it did not end within 3 s")
