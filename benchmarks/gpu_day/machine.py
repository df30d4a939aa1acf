"""What the machine is: the GPU, its clocks and driver, compilers, tools and packages. What is missing is said."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys

from runtime.backends.cuda.driver import find_device
from runtime.console.run import run

GPU = "name,compute_cap,driver_version,memory.total,persistence_mode,power.limit,temperature.gpu,ecc.mode.current"
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,clocks_event_reasons.active"
COMMANDS = (
    ("nvidia-smi",),
    ("nvidia-smi", f"--query-gpu={GPU}", "--format=csv"),
    ("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"),
    ("nvcc", "--version"),
    ("cmake", "--version"),
    ("g++", "--version"),
    ("compute-sanitizer", "--version"),
    ("ncu", "--version"),
)
PACKAGES = (
    *("torch", "numpy", "ml_dtypes", "pytest", "pytest-xdist", "pycuda", "cuda-bindings", "tensorrt", "tensorrt-rtx"),
    *("onnx", "onnxruntime", "tokenizers", "pillow", "tqdm", "cupy-cuda13x", "triton"),
)


def said(command: tuple[str, ...]) -> str:
    """What a program prints, or that it is not here."""
    program = shutil.which(command[0])
    if program is None:
        return "not installed"
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)  # noqa: S603 - fixed
    return (result.stdout + result.stderr).strip() + (f"\nexit code {result.returncode}" if result.returncode else "")


def version(package: str) -> str:
    """A package's version, or that it is not here."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def torch_facts() -> str:
    """What PyTorch sees."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU"
    facts = torch.cuda.get_device_properties(0)
    return (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}: {facts.name}, SM {facts.major}.{facts.minor}, "
        f"{facts.multi_processor_count} multiprocessors, {facts.L2_cache_size >> 20} MiB of L2, "
        f"{facts.total_memory >> 20} MiB"
    )


def main() -> None:
    """Prints everything; the last line is the short form."""
    for command in COMMANDS:
        print(f"$ {' '.join(command)}\n{said(command)}\n", flush=True)
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {sys.version.split()[0]} at {sys.executable}")
    print(*(f"{package} {version(package)}" for package in PACKAGES), sep="\n")
    print(torch_facts())
    device = find_device()
    if device is None:
        print("the driver shows no GPU")
        return
    free, total = (size >> 20 for size in (device.free_memory, device.total_memory))
    print(f"{device.name}, SM {device.capability / 10:.1f}, {free} of {total} MiB free")


if __name__ == "__main__":
    run(main)
