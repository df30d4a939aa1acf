"""Makes the libraries that NVIDIA's Python modules are run on, and says what is missing where that cannot be.

Everything lies under ``build/``, in a folder named after what it is made of, and is kept between runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ...conftest import ROOT, alone
from .defaults import defaults

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build"
BINDINGS = BUILD / "tensorrt_bindings"
"""NVIDIA's Python modules, by version: each without the libraries that it is linked with."""

RUN_ON = "10.14"
"""The version whose headers the library of this folder is made of."""

_HEADERS = BUILD / "tensorrt_headers/kernel_lens/include/tensorrt"

_SOURCES = ("plan.cpp", "log.cpp", "engine.cpp", "registry.cpp", "runtime.cpp")

PLUGIN, OTHER_PLUGIN, NO_PLUGIN = "libplugin.so", "libother.so", "libnone.so"
"""Plugin libraries: with the plugin of the tiny models, with another, and one that is none."""


def bindings(version: str) -> Path:
    """Returns the folder of NVIDIA's Python module of a version; skips the test where it is not here."""
    folder = BINDINGS / version / "tensorrt_bindings"
    if not BINDINGS.is_dir():
        pytest.skip("NVIDIA's Python modules of TensorRT are not here; this fetches them: make build/tensorrt_bindings")
    if not folder.is_dir():
        pytest.skip(f"of TensorRT {version} NVIDIA has no module for this Python, or it could not be fetched")
    python = "cp{}{}".format(*sys.version_info)
    if not any(f"Tag: {python}-" in wheel.read_text() for wheel in folder.parent.glob("*.dist-info/WHEEL")):
        pytest.skip(f"{BINDINGS} is of another Python: remove it, then: make build/tensorrt_bindings")
    return folder.parent


def build_libraries() -> Path:
    """Returns a folder with libnvinfer, what stands beside it, and plugin libraries; skips where it cannot be made."""
    if not _HEADERS.is_dir():
        pytest.skip("TensorRT's headers are not here; this fetches them: make build/tensorrt_headers")
    headers = ["-isystem", str(_HEADERS), f"-I{HERE}"]

    def commands(folder: Path) -> Iterator[list[str]]:
        (folder / "defaults.h").write_text(defaults(_HEADERS))
        cpp = ["g++", "-std=c++17", "-O1", "-Wall", "-Wno-deprecated-declarations", "-shared", "-fPIC", *headers]
        sources = [str(HERE / source) for source in _SOURCES]
        yield [*cpp, *_named(folder, "libnvinfer.so.10"), f"-I{folder}", *sources, "-ldl"]
        for name in ("libnvinfer_plugin.so.10", "libnvonnxparser.so.10"):
            yield [*_empty(), *_named(folder, name)]
        for name, plugin in ((PLUGIN, "FusedMoE"), (OTHER_PLUGIN, "Another")):
            yield [*cpp, *_named(folder, name), f'-DPLUGIN="{plugin}"', str(HERE / "plugin.cpp")]
        yield [*_empty(), *_named(folder, NO_PLUGIN)]

    return _made("nvinfer", commands)


def empty_libraries() -> Path:
    """Returns a folder with what NVIDIA's modules of TensorRT 10 and 11 are linked with: nothing works, all imports."""

    def commands(folder: Path) -> Iterator[list[str]]:
        for version in ("10", "11"):
            for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
                yield [*_empty(), *_named(folder, f"{name}.so.{version}")]

    return _made("nvinfer_empty", commands)


def _empty() -> list[str]:
    return ["gcc", "-shared", "-fPIC", str(HERE / "empty.c")]


def _named(folder: Path, name: str) -> list[str]:
    return [f"-Wl,-soname,{name}", "-o", str(folder / name)]


def _made(name: str, commands: Callable[[Path], Iterator[list[str]]]) -> Path:
    for program in ("gcc", "g++"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, which compiles the libraries that stand in for TensorRT's")
    digest = hashlib.sha256()
    for file in sorted(HERE.iterdir()):
        if file.suffix in (".c", ".cpp", ".h") or file.name in ("defaults.py", "building.py"):
            digest.update(file.read_bytes())
    folder = BUILD / name
    target = folder / digest.hexdigest()[:12]
    with alone(folder):
        if not target.exists():
            shutil.rmtree(folder, ignore_errors=True)
            partial = folder / "partial"
            partial.mkdir(parents=True)
            for command in commands(partial):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            partial.rename(target)
    return target
