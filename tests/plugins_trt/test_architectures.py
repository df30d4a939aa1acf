"""Which GPUs the plugin library is compiled for, with the lists that nvcc prints in other releases of CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.backends.plugin_library import OLDEST

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {
    "12.6": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.9": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 103 120 121",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
}
"""``nvcc --list-gpu-code``, without what is for one family of GPUs only."""


def program(path: Path, *lines: str) -> Path:
    """Of the shell."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """Where a program of that name may be put."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed, which chooses the architectures")
    (tmp_path / "cuda").mkdir()
    return tmp_path / "cuda/nvcc"


def release(nvcc: Path, name: str) -> None:
    """Puts an nvcc there that knows the GPUs of a release of CUDA."""
    program(nvcc, *(f"echo sm_{number}" for number in KNOWN[name].split()))


def cmake(nvcc: Path, *options: str) -> tuple[list[str], str]:
    """The architectures, and all that is said, as words with one space between them."""
    command = ["cmake", f"-DCMAKE_CUDA_COMPILER={nvcc}", *options, "-P", ROOT / "plugins_trt/architectures.cmake"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    chosen = re.search(r"^-- Architectures: (.*)$", result.stdout, re.M)
    assert (result.returncode == 0) == bool(chosen)
    return chosen[1].split(";") if chosen else [], " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize(
    ("name", "machine_code", "newest", "left_out"),
    [
        ("12.6", "80 86 87 89 90", "90", "100 110 120"),
        ("12.9", "80 86 87 89 90 100 120", "120", "110"),
        ("13.0", "80 86 87 89 90 100 110 120", "120", ""),
    ],
)
@pytest.mark.parametrize("word", [None, "all", "all-major"])
def test_all_that_nvcc_knows(
    nvcc: Path, name: str, machine_code: str, newest: str, left_out: str, word: str | None
) -> None:
    """For every GPU that ``export.engine`` builds for, and PTX for those that come later."""
    release(nvcc, name)
    chosen, said = cmake(nvcc, *([] if word is None else [f"-DCMAKE_CUDA_ARCHITECTURES={word}"]))
    assert chosen == [*(f"{number}-real" for number in machine_code.split()), f"{newest}-virtual"]
    for number in left_out.split():
        assert f"No code for SM {number}: this nvcc does not know it" in said


@pytest.mark.parametrize(
    ("printed", "chosen"), [("87", ["87-real"]), ("89", ["89-real"]), ("120,89,120", ["120-real", "89-real"])]
)
def test_the_gpus_at_hand(nvcc: Path, printed: str, chosen: list[str]) -> None:
    """By the program that nvcc asks for them: CMake 3.22, which JetPack 6 has, cannot find out."""
    release(nvcc, "13.0")
    program(nvcc.with_name("__nvcc_device_query"), f"echo {printed}")
    link = nvcc.parent.parent / "nvcc"
    link.symlink_to(nvcc)
    for path in (nvcc, link):
        assert cmake(path, "-DCMAKE_CUDA_ARCHITECTURES=native")[0] == chosen


@pytest.mark.parametrize("lines", [None, ["echo no driver >&2", "exit 1"]], ids=["no program", "no GPU"])
def test_no_gpu_at_hand(nvcc: Path, lines: list[str] | None) -> None:
    release(nvcc, "13.0")
    if lines is not None:
        program(nvcc.with_name("__nvcc_device_query"), *lines)
    _, said = cmake(nvcc, "-DCMAKE_CUDA_ARCHITECTURES=native")
    assert "is native, but CUDA finds no GPU here: name the one to compile for, as 87 for Orin" in said


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("75", f"asks for 75, but the kernels need SM {OLDEST} or later"),
        ("89;75-real", f"asks for 75, but the kernels need SM {OLDEST} or later"),
        ("72-virtual", f"asks for 72, but the kernels need SM {OLDEST} or later"),
        ("101", "asks for 101, this nvcc knows 75, 80, 86, 87"),
    ],
)
def test_refused(nvcc: Path, asked: str, words: str) -> None:
    release(nvcc, "13.0")
    assert words in cmake(nvcc, f"-DCMAKE_CUDA_ARCHITECTURES={asked}")[1]


def test_an_old_gpu_at_hand_is_refused(nvcc: Path) -> None:
    release(nvcc, "13.0")
    program(nvcc.with_name("__nvcc_device_query"), "echo 75")
    assert f"the kernels need SM {OLDEST} or later" in cmake(nvcc, "-DCMAKE_CUDA_ARCHITECTURES=native")[1]


@pytest.mark.parametrize("asked", ["87", "87-real;120-virtual", "90a;100f"])
def test_what_is_named_stays_as_it_is(nvcc: Path, asked: str) -> None:
    release(nvcc, "13.0")
    assert cmake(nvcc, f"-DCMAKE_CUDA_ARCHITECTURES={asked}")[0] == asked.split(";")
