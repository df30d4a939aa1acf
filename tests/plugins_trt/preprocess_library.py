"""The kernel that resizes pictures, compiled for a CPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.backends.tensorrt.pixels import ENTRY

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "plugins_trt/core"


@functools.cache
def resize_on_cpu(folder: Path) -> ctypes._CFuncPtr:
    """The entry that the runtime calls; skips the test where there is no compiler."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    library = folder / "libpreprocess.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
    command += ["-fsanitize-undefined-trap-on-error", "-DMONOEDGE_EMULATION", f"-I{HERE / 'emulation'}", f"-I{CORE}"]
    source = ["-include", "cuda_runtime.h", "-x", "c++", str(CORE / "preprocess.cu")]
    subprocess.run([*command, *source, "-o", str(library)], check=True)
    return getattr(ctypes.CDLL(str(library)), ENTRY)
