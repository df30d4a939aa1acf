"""The kernels compile for every chip without a warning, and what has to be fast keeps its numbers in registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .kernels import CORE

ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "110", "120")
"""Those of ``plugins_trt/architectures.cmake``."""
HOT = ("decodeKernel", "prefillKernel")
INSTANCES = 2 * 2 * 2
"""Of each hot kernel: two types, gated or not, and two tiles."""

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
    re.S,
)


def find_nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    return nvcc


def test_benchmark_compiles(tmp_path: Path) -> None:
    source = CORE.parent.parent / "benchmarks" / "kernels.cu"
    command = [find_nvcc(), "-std=c++17", "-arch=sm_87", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    subprocess.run([*command, f"-I{CORE}", "-c", str(source), "-o", str(tmp_path / "benchmark.o")], check=True)


@pytest.mark.slow
def test_every_architecture_compiles_without_spills(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    architectures = [number for number in ARCHITECTURES if f"sm_{number}" in known]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    newest = f"compute_{architectures[-1]}"
    command = [nvcc, "-std=c++17", "-O3", "--threads=2", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command += [*targets, f"-gencode=arch={newest},code={newest}", "-Xptxas=-v"]
    result = subprocess.run(
        [*command, "-c", str(CORE / "experts.cu"), "-o", str(tmp_path / "experts.o")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    entries = [entry.groupdict() for entry in _ENTRY.finditer(result.stderr)]
    for architecture in architectures:
        for kernel in HOT:
            found = [e for e in entries if e["architecture"] == architecture and kernel in e["name"]]
            assert len(found) == INSTANCES, (architecture, kernel)
            spilled = [e for e in found if int(e["stores"]) or int(e["loads"])]
            assert not spilled, spilled
