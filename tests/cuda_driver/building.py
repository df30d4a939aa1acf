"""The driver of this folder, compiled, and the packages that run on it: where they lie, or why something is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..conftest import ROOT, alone

SOURCES = Path(__file__).resolve().parent / "driver"
INCLUDE = ROOT / "build/cuda_headers/nvidia/cu13/include"
PACKAGES = ROOT / "build/cuda_packages"
"""PyCUDA and cuda-bindings. Not in the tests' own environment, whose tests must find no GPU software."""
DRIVER = ROOT / "build/cuda_driver/libcuda.so.1"

_DECLARED = re.compile(r"\bCUresult\s+(cu[A-Z]\w*)\s*\(")


def missing() -> str | None:
    """Returns why the driver or the packages cannot be had, with what makes them, or None."""
    if shutil.which("gcc") is None:
        return "gcc is not installed, which compiles the driver"
    for what, folder in (("NVIDIA's CUDA headers are", INCLUDE), ("PyCUDA and cuda-bindings are", PACKAGES)):
        if not folder.is_dir():
            return f"{what} not here; this fetches them: make {'/'.join(folder.relative_to(ROOT).parts[:2])}"
    return None


def build_driver() -> Path:
    """Compiles the driver unless it is up to date; returns the folder for ``LD_LIBRARY_PATH``."""
    sources = sorted(SOURCES.glob("*.c"))
    with alone(DRIVER):
        newest = max(file.stat().st_mtime for file in (*sources, SOURCES / "driver.h", Path(__file__)))
        if not DRIVER.exists() or DRIVER.stat().st_mtime < newest:
            stubs = DRIVER.with_name("unimplemented.c")
            stubs.write_text(_stubs(sources))
            made = DRIVER.with_name("made.so")
            compile_library((*sources, stubs), made, "libcuda.so.1", "-ldl", "-lpthread")
            made.rename(DRIVER)
    return DRIVER.parent


def compile_library(sources: Sequence[Path], target: Path, name: str, *options: str, compiler: str = "gcc") -> None:
    """Compiles a shared library whose soname is ``name``, with NVIDIA's headers."""
    command = [compiler, "-O1", "-g", "-Wall", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-I{INCLUDE}"]
    result = subprocess.run([*command, "-o", target, *sources, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr


def _stubs(sources: Sequence[Path]) -> str:
    """Source of what the header declares and the driver has not: calls that complain. PyCUDA links to many of them."""
    declare = ["gcc", "-E", "-P", f"-I{INCLUDE}", "-include", "cuda.h", "-include", "cudaProfiler.h", "-x", "c"]
    header = subprocess.run([*declare, "/dev/null"], capture_output=True, text=True, check=True).stdout
    written = {name for file in sources for name in re.findall(r"^CUresult (cu\w+)\(", file.read_text(), re.MULTILINE)}
    names = sorted(set(_DECLARED.findall(header)) - written)
    return "\n".join(
        [
            "int fake_unimplemented(char const* function);",
            *(f"int {name}(void) {{ return fake_unimplemented(__func__); }}" for name in names),
            "char const* const unimplemented[] = {",
            *(f'    "{name}",' for name in names),
            "    0};",
            "",
        ]
    )
