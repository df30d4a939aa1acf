"""What is tried in a process of its own. ``runtime.doctor.children`` starts it: ``TRIAL '{"argument": …}'``.

Each function returns what JSON can hold. What a library prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.doctor.gpu_trials import bandwidth, resize
from runtime.errors import BackendError, MonoedgeError

# Backends and their packages are imported by the trial that is about them.


def imported(module: str) -> str:
    """Imports a package; returns its version, empty where it does not say."""
    return str(getattr(importlib.import_module(module), "__version__", ""))


def driver() -> dict[str, Any]:
    """Asks NVIDIA's driver library: its file, its CUDA, how it starts, and how many GPUs it shows."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(str(error)) from None
    version, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_char_p()
    library.cuDriverGetVersion(ctypes.byref(version))
    status = library.cuInit(0)
    if status:
        library.cuGetErrorName(status, ctypes.byref(name))
    else:
        library.cuDeviceGetCount(ctypes.byref(count))
    return {
        "file": next(iter(loaded_files(r"/libcuda\.so")), "libcuda.so.1"),
        "cuda": version.value,
        "status": status,
        "error": (name.value or b"").decode(errors="replace"),
        "count": count.value,
    }


def device() -> dict[str, Any] | None:
    """Finds the first GPU."""
    from runtime.backends.cuda.driver import find_device

    found = find_device()
    return None if found is None else asdict(found)


def pycuda() -> list[int]:
    """Imports PyCUDA as the backend does; returns the version of the CUDA that it was compiled with."""
    importlib.import_module("runtime.backends.cuda.pycuda")
    return list(importlib.import_module("pycuda.driver").get_version())


def tensorrt(target: str) -> dict[str, Any]:
    """Imports a TensorRT; tells the version of its module, and those of the libraries that it loaded."""
    from runtime.backends.tensorrt.library import TensorRT
    from runtime.bundle.targets import TARGETS

    version = TensorRT(TARGETS[target]).version
    libraries = {}
    for file in loaded_files(r"/lib(nvinfer|tensorrt_rtx)\.so"):
        with contextlib.suppress(OSError, AttributeError):
            libraries[file] = library_version(file)
    return {"version": version, "libraries": libraries}


def library_version(file: str) -> list[int]:
    """Returns the version that a TensorRT library gives itself, as [10, 3, 0].

    Its number is 10000 · major + 100 · minor + patch, before TensorRT 10 1000 · major (``NvInferVersion.h``).
    """
    number = int(ctypes.CDLL(file).getInferLibVersion())
    major = 10000 if number >= 10000 else 1000
    return [number // major, number % major // 100, number % 100]


def plugin(library: str, symbols: list[str]) -> list[str]:
    """Loads the plugin library with all its symbols resolved; returns those functions that it does not have."""
    try:
        opened = ctypes.CDLL(library, os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise BackendError(f"it cannot be loaded: {error}") from None
    return [symbol for symbol in symbols if not hasattr(opened, symbol)]


def register(target: str, library: str, operators: dict[str, int]) -> str:
    """Registers the library's plugins in a TensorRT; returns that one's version."""
    from runtime.backends.tensorrt.library import TensorRT
    from runtime.bundle.targets import TARGETS

    opened = TensorRT(TARGETS[target])
    opened.load_plugins(Path(library), operators)
    return opened.version


def backend(name: str, bundle: str) -> str:
    """Does all that a backend does before it reads weights; returns what would compute."""
    from runtime.backends import DEFAULT, backend_class
    from runtime.bundle.manifest import DECODER_GRAPH
    from runtime.bundle.reader import Bundle

    opened, kind = Bundle(bundle), backend_class(name)
    if name == "tensorrt":
        from runtime.backends.cuda.pycuda import PyCudaDevice
        from runtime.backends.tensorrt.loader import Loader

        return Loader(opened, PyCudaDevice()).description
    if name == DEFAULT:
        from runtime.backends.graph import GraphInMemory

        return str(kind(opened, graphs={DECODER_GRAPH: GraphInMemory(EMPTY_GRAPH)}).description)
    ort = importlib.import_module("onnxruntime")
    if kind.provider not in ort.get_available_providers() or opened.manifest.by_expert:
        kind(opened)  # says why not, before it reads weights
    return _start_provider(ort, kind.provider)


def _start_provider(ort: Any, provider: str) -> str:  # noqa: ANN401 - the module
    """Starts a provider of ONNX Runtime on a graph without weights; it only logs what is missing."""
    try:
        if provider in ort.InferenceSession(EMPTY_GRAPH, providers=[provider], enable_fallback=0).get_providers():
            return f"onnxruntime {ort.__version__}, {provider}"
        reason = "no GPU that it can use"
    except Exception as error:
        reason = str(error)
    folder, kind = Path(ort.__file__).parent / "capi", provider.removesuffix("ExecutionProvider").lower()
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), os.RTLD_NOW | os.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{kind}.so"), os.RTLD_NOW)
    except OSError as error:
        reason = str(error)
    raise BackendError(
        f"onnxruntime {ort.__version__} cannot start its {provider} ({' '.join(reason.split())}): install the "
        "libraries of NVIDIA that it was built for"
    )


def kernels() -> int:
    """Tries the operators' kernels on the GPU; returns how many problems agreed with float64."""
    from runtime.doctor import kernel_trials

    return kernel_trials.kernels()


EMPTY_GRAPH = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX graph without weights, y = x, which ONNX Runtime opens in the place of a bundle's decoder."""


def loaded_files(pattern: str) -> list[str]:
    """Returns the files of that name that this process has mapped, in the order of the system's list."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    files = (line.split(maxsplit=5)[5] for line in lines if line.count("/") and re.search(pattern, line))
    return list(dict.fromkeys(files))


TRIALS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (imported, driver, device, pycuda, tensorrt, plugin, register, backend, bandwidth, resize, kernels)
}


def run(trial: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs a trial; returns its value, or why it failed in one line."""
    function = TRIALS[trial]
    try:
        return {"value": function(**arguments)}
    except MonoedgeError as error:
        return {"failed": str(error)}
    except ImportError as error:
        return {"failed": " ".join(f"cannot be imported: {error}".split())}
    except Exception as error:
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())}


if __name__ == "__main__":
    # What a library prints must not look like the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))), file=answer, flush=True)
