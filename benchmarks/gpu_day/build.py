"""Compiles what the GPU day runs, with lines of source in it for the tools that watch kernels.

    python -m benchmarks.gpu_day.build kernels DIR --arch 90
    python -m benchmarks.gpu_day.build plugin DIR --arch 90 --headers DIR

``kernels``: the library of the kernels' functions and the program of ``benchmarks/kernels.cu``, by nvcc alone.
``plugin``: the plugin library as users build it, by CMake, and what plays TensorRT's part.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from runtime.backends.cuda.driver import find_device
from runtime.backends.plugin_library import LIBRARY
from runtime.console.run import run
from runtime.errors import MonoedgeError, OptionError

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "plugins_trt/core"
KERNELS, LAYERS, PLUGIN_CALL = "libkernels.so", "layers", "libplugin_call.so"


def nvcc(architecture: str, *arguments: str | Path) -> list[str]:
    """A command of the compiler, for one GPU.

    Raises:
        MonoedgeError: there is no nvcc.
    """
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise MonoedgeError("nvcc is not installed: https://developer.nvidia.com/cuda-downloads")
    return [found, "-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{architecture}", *map(str, arguments)]


def kernels(folder: Path, architecture: str) -> list[list[str]]:
    """The commands that make ``KERNELS`` and ``LAYERS``."""
    shared, sources = ("-shared", "-Xcompiler=-fPIC"), sorted(CORE.glob("*.cu"))
    return [
        nvcc(architecture, *shared, CORE / "experts.cu", "-o", folder / KERNELS),
        nvcc(architecture, f"-I{CORE}", ROOT / "benchmarks/kernels.cu", *sources, "-o", folder / LAYERS),
    ]


def plugin(folder: Path, architecture: str, headers: Path) -> list[list[str]]:
    """The commands that make the plugin library and, linked to it, ``PLUGIN_CALL``."""
    library, source = folder / LIBRARY, ROOT / "benchmarks/gpu_day/plugin_call.cpp"
    build = [sys.executable, "-m", "plugins_trt.build", "--arch", architecture, "--headers", str(headers)]
    linked = ("-shared", "-Xcompiler=-fPIC", "-Xlinker=-rpath,$ORIGIN", "-isystem", headers, source, library)
    return [[*build, "-o", str(library)], nvcc(architecture, *linked, "-o", folder / PLUGIN_CALL)]


def compile_all(commands: list[list[str]], at_once: bool) -> None:
    """Runs compilers.

    Raises:
        MonoedgeError: one of them failed; what it says is above.
    """
    environment = {**os.environ, "CUDAFLAGS": "-lineinfo", "PYTHONPATH": str(ROOT)}
    if shutil.which("make") is None and shutil.which("ninja"):
        environment["CMAKE_GENERATOR"] = "Ninja"
    processes = []
    for command in commands:
        print(shlex.join(command), flush=True)
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))  # noqa: S603 - our own words
        if not at_once and processes[-1].wait():
            break
    for command, process in zip(commands, processes, strict=False):
        if process.wait():
            raise MonoedgeError(f"{command[0]} failed with exit code {process.returncode}; what it says is above")


def main() -> None:
    """Reads the command line and compiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "plugin"))
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to")
    parser.add_argument("--arch", metavar="NN", help="as 90 for 9.0 (default: the GPU at hand)")
    parser.add_argument("--headers", type=Path, metavar="DIR", help="the folder of NvInferRuntime.h")
    arguments = parser.parse_args()
    device = find_device()
    architecture = arguments.arch or (device and str(device.capability))
    if architecture is None:
        raise OptionError("there is no GPU here: name the one to build for with --arch, as 90 for 9.0")
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "kernels":
        compile_all(kernels(folder, architecture), at_once=True)
    elif arguments.headers is None:
        raise OptionError("plugin: name the folder of NvInferRuntime.h with --headers DIR")
    else:
        compile_all(plugin(folder, architecture, arguments.headers.absolute()), at_once=False)
    print(f"built for SM {architecture}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    run(main)
