"""The steps of the GPU day, in order of worth: what each proves, runs, needs, and how long it may take."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_day.build import KERNELS, LAYERS, PLUGIN_CALL, ROOT
from runtime.backends.plugin_library import LIBRARY

TENSORRT_TESTS = "tests/runtime/backends/tensorrt/test_gpu.py"


@dataclass(frozen=True)
class Step:
    """One command with its own limit.

    Attributes:
        name: also that of its log.
        proves: in a few words, for the summary.
        command: runs in the checkout.
        limit: seconds after which it is killed with its children.
        programs: on the PATH, without which it is skipped.
        packages: of Python, without which it is skipped.
        files: which it needs, of earlier steps or carried; without them it is skipped.
        makes: files without which it counts as not done.
        instead: what shows part of the same where it is skipped.
        gpu: whether it needs one.
        always: whether each call runs it anew.
        shown_by: what its last line has where it showed something: tests that are all skipped show nothing.
    """

    name: str
    proves: str
    command: tuple[str, ...]
    limit: float
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()
    instead: str = ""
    gpu: bool = True
    always: bool = False
    shown_by: str = ""


SANITIZERS = {
    "memcheck": (180, "no access outside of a tensor, and none at an odd address", ()),
    "racecheck": (240, "no race in shared memory", ("--racecheck-report", "all")),
    "synccheck": (120, "barriers are reached by all who must", ()),
    "initcheck": (120, "nothing is read that was not written", ()),
}


def steps(out: Path, architecture: str | None, headers: Path | None) -> list[Step]:
    """All steps.

    Args:
        out: where results go; what is built goes to ``built`` in it.
        architecture: of the GPU, as ``"90"``; None: that of the GPU at hand.
        headers: the folder of TensorRT's headers, or None.
    """
    built = out / "built"
    arch = ("--arch", architecture) if architecture else ()

    def ours(module: str, *arguments: str | Path) -> tuple[str, ...]:
        return (sys.executable, "-m", f"benchmarks.gpu_day.{module}", *map(str, arguments))

    kernels, layers, library, call = (built / name for name in (KERNELS, LAYERS, LIBRARY, PLUGIN_CALL))
    headers_file = (headers or ROOT / "build/tensorrt_headers") / "NvInferRuntime.h"
    numeric = ("numpy", "ml_dtypes")
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider")
    # The tests of kernels need none of the fixtures that bundles are made by, nor the packages of those.
    alone = ("--noconftest", *(("-n", "4") if importlib.util.find_spec("xdist") else ()))
    # What float64 says is computed on the CPU, by several processes at once.
    threads = ("env", "OPENBLAS_NUM_THREADS=4", "OMP_NUM_THREADS=4")
    moe = (sys.executable, "benchmarks/fused_moe.py", "--library", str(kernels))
    agree = ours("agree", "--kernels", kernels)
    return [
        Step("machine", "what the numbers below depend on", ours("machine"), 60, gpu=False, always=True),
        Step(
            "build-kernels",
            "nvcc compiles the kernels for this GPU",
            ours("build", "kernels", built, *arch),
            180,
            programs=("nvcc",),
            makes=(kernels, layers),
            gpu=False,
        ),
        Step(
            "kernels",
            "every form on every path agrees with float64",
            (*agree, "--problems", "small"),
            90,
            packages=numeric,
            files=(kernels,),
        ),
        Step(
            "pytest",
            "the tests marked gpu: float64 at all sizes, the same bits a hundred times, captured graphs",
            (*threads, *pytest, *alone, "tests/plugins_trt/test_kernels_gpu.py", "tests/benchmarks/test_fused_moe.py"),
            420,
            programs=("nvcc",),
            packages=("pytest", "torch", *numeric),
            instead="kernels-all",
            shown_by=" passed",
        ),
        Step(
            "build-plugin",
            "CMake builds the plugin library for this GPU",
            ours("build", "plugin", built, *arch, "--headers", headers_file.parent),
            240,
            programs=("nvcc", "cmake"),
            files=(headers_file,),
            makes=(library, call),
            gpu=False,
        ),
        *(
            Step(
                tool,
                proves,
                (
                    *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *options),
                    *(*agree, "--problems", "small", "--unwritten"),
                ),
                limit,
                programs=("compute-sanitizer",),
                packages=numeric,
                files=(kernels,),
            )
            for tool, (limit, proves, options) in SANITIZERS.items()
        ),
        Step(
            "plugin",
            "from creator to enqueue, as TensorRT calls it, on device memory: agrees with float64",
            ours("agree", "--plugin", call, "--problems", "small"),
            90,
            packages=numeric,
            files=(library, call),
        ),
        Step(
            "pixels",
            "pictures in device memory become tiles with Pillow's bits",
            ours("pixels", library),
            60,
            packages=("numpy", "PIL"),
            files=(library,),
        ),
        Step(
            "device",
            "the driver's facts, page-locked copies, events and graphs of the TensorRT backend's device layer",
            ours("device"),
            60,
            packages=("numpy",),
        ),
        Step(
            "decode",
            "time of a layer with 1 to 16 rows, beside PyTorch and the bounds",
            (*moe, "--rows", "1", "8", "16", "--json", str(out / "decode.json")),
            180,
            packages=("torch", *numeric),
            files=(kernels,),
            instead="layers",
        ),
        Step(
            "prefill",
            "time of a layer with 64 to 2900 rows, beside PyTorch and the bounds",
            (*moe, "--rows", "64", "320", "1280", "2900", "--json", str(out / "prefill.json")),
            240,
            packages=("torch", *numeric),
            files=(kernels,),
            instead="layers",
        ),
        Step("layers", "the same times without PyTorch", (str(layers),), 90, files=(layers,)),
        Step(
            "ncu",
            "what bounds the kernels that are furthest from their floor",
            ours("ncu", layers, out),
            240,
            programs=("ncu",),
            files=(layers,),
        ),
        Step(
            "kernels-all",
            "float64 at the model's sizes, and with any two properties together",
            (*agree, "--problems", "all"),
            240,
            packages=numeric,
            files=(kernels,),
        ),
        Step(
            "tensorrt",
            "plans built here give the official answers",
            (*pytest, TENSORRT_TESTS),
            600,
            packages=("tensorrt", "pycuda", "pytest", "torch", "onnx"),
            files=(library, ROOT / TENSORRT_TESTS, ROOT / "tests/data/golden"),
            instead="plugin, device",
            shown_by=" passed",
        ),
    ]
