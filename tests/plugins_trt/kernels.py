"""The kernels behind ctypes, and memory to call them with."""

from __future__ import annotations

import ctypes
import functools
import mmap
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plugins_trt.schema import EXPERTS, FUSED_MOE, MATRICES
from runtime.doctor.kernel_trials import BFLOAT16, PARAMS, Weight
from runtime.doctor.plugin import KERNELS

from .problems import NUMPY_TYPES, Data, Problem, check, reference

HERE = Path(__file__).resolve().parent
CORE = HERE.parent.parent / "plugins_trt" / "core"
SUCCESS, INVALID_VALUE, OUT_OF_RESOURCES = 0, 1, 701
WARNINGS = ("-Wall", "-Wextra", "-Werror")
GUARD = 256
"""Bytes before and behind each buffer that nobody may write."""


_C_NAMES = {
    "text_gate_up": "textGateUp",
    "text_down": "textDown",
    "visual_gate_up": "visualGateUp",
    "visual_down": "visualDown",
    "text_weight": "text",
    "visual_weight": "visual",
}
_TYPE_CODES = {"float16": 0, "bfloat16": BFLOAT16}
POISON = 0xFF
UNMAPPED = 0x1000
"""Where nothing is mapped, on no system."""


def aligned(size: int, offset: int = 0) -> np.ndarray:
    """`size` bytes of poison, guarded, that begin `offset` bytes behind a multiple of `GUARD`."""
    buffer = np.full(size + 3 * GUARD + offset, POISON, np.uint8)
    begin = -buffer.ctypes.data % GUARD + GUARD + offset
    return buffer[begin : begin + size]


def guards_hold(array: np.ndarray) -> bool:
    """Whether nothing was written outside of an array of `aligned`."""
    buffer = array
    while buffer.base is not None:
        buffer = buffer.base
    begin = array.ctypes.data - buffer.ctypes.data
    return bool((buffer[:begin] == POISON).all() and (buffer[begin + array.nbytes :] == POISON).all())


def fenced(size: int, offset: int = 0) -> np.ndarray:
    """`size` bytes of poison behind which, but for what alignment to 16 needs, nothing is mapped."""
    end = -(-(size + offset) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    buffer = np.frombuffer(memory, np.uint8)
    fence = ctypes.c_void_p(buffer.ctypes.data + end)
    assert ctypes.CDLL(None).mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    begin = (end - size - offset) // 16 * 16 + offset
    buffer[begin:end] = POISON
    return buffer[begin : begin + size]


def placed(array: np.ndarray, offset: int = 0, allocate: Callable[[int, int], np.ndarray] = aligned) -> np.ndarray:
    """A copy with the wanted alignment."""
    target = allocate(array.nbytes, offset)
    target[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return target.view(array.dtype).reshape(array.shape)


class Kernels:
    """A library of `experts.cu`; one for a CPU has the functions of `kernel_library.cpp` too."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        sizes = (*(f"{entry}Workspace" for entry in KERNELS.values()), "monoedgeCopiedBytes")
        for name in sizes:
            if hasattr(self.library, name):
                getattr(self.library, name).restype = ctypes.c_size_t

    def emulate(
        self,
        processors: int = 3,
        backwards: bool = False,
        failing_launch: int = -1,
        failure: int = OUT_OF_RESOURCES,
        watched: np.ndarray | None = None,
    ) -> None:
        """How the CPU stands in for a device: multiprocessors, the order in which threads get their turns, which launch
        fails and how, and where to count the bytes that are copied from. Counts begin anew."""
        begin, size = (watched.ctypes.data, watched.nbytes) if watched is not None else (0, 0)
        self.library.monoedgeEmulate(
            processors, backwards, failing_launch, failure, ctypes.c_void_p(begin), ctypes.c_size_t(size)
        )

    def workspace(self, problem: Problem) -> int:
        """Bytes of workspace."""
        name = f"{KERNELS[problem.operator.name]}Workspace"
        sizes = (ctypes.c_int64(size) for size in (problem.rows, problem.hidden, problem.size))
        return int(getattr(self.library, name)(*sizes))

    def params(self, problem: Problem, addresses: dict[str, int], workspace_size: int, **changed: Any) -> Any:
        """The struct of a call. `addresses` has the tensors of the schema, `<matrix>.scale` and `.input_scale`."""
        weights = {
            _C_NAMES[f"{expert}_{name}"]: Weight(
                *(addresses.get(f"{expert}_{name}{part}") for part in ("", ".scale", ".input_scale"))
            )
            for expert in EXPERTS
            for name in MATRICES[problem.operator.name]
        }
        sizes = ("hidden", "inter") if problem.operator is FUSED_MOE else ("in", "out")
        values = {
            "type": _TYPE_CODES[problem.type],
            "rows": problem.rows,
            sizes[0]: problem.hidden,
            sizes[1]: problem.size,
            "hiddenStates": addresses["hidden_states"],
            "visualMask": addresses["visual_mask"],
            **weights,
            "output": addresses["output"],
            "workspace": addresses["workspace"],
            "workspaceSize": workspace_size,
        }
        return PARAMS[problem.operator.name](**{**values, **changed})

    def call(self, problem: Problem, params: Any, stream: int = 0) -> int:
        """The status."""
        return int(getattr(self.library, KERNELS[problem.operator.name])(ctypes.byref(params), ctypes.c_void_p(stream)))

    def run(
        self,
        data: Data,
        offset: int = 0,
        moved: tuple[str, ...] | None = None,
        unmapped: tuple[str, ...] = (),
        watched: str | None = None,
        allocate: Callable[[int, int], np.ndarray] = aligned,
        **changed: Any,
    ) -> tuple[int, np.ndarray]:
        """Status and output, in host memory. Tensors, or only the moved ones, begin `offset` bytes behind an aligned
        address. What is copied from the matrix `watched` is counted, on a device so large that tiles are small."""
        problem = data.problem
        size = self.workspace(problem)
        # What follows the mask looks like more rows of both experts, where it can be read at all.
        mask = data.mask if allocate is fenced else np.concatenate([data.mask, np.arange(64) % 2 == 0])

        def offset_of(name: str) -> int:
            return offset if moved is None or name in moved else 0

        arrays = {
            "hidden_states": placed(data.hidden_states, offset_of("hidden_states"), allocate),
            "visual_mask": placed(mask, 0, allocate),
            "workspace": allocate(size, 0),
            "output": allocate(2 * problem.rows * problem.out, offset_of("output")),
        }
        for name, matrix in data.matrices.items():
            arrays[name] = placed(matrix.data, offset_of(name), allocate)
            for part in ("scale", "input_scale"):
                value = getattr(matrix, part)
                if value is not None:
                    arrays[f"{name}.{part}"] = placed(value, 0, allocate)
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        for name in addresses:
            if name.startswith(
                tuple(f"{expert}_{matrix}" for expert in unmapped for matrix in MATRICES[problem.operator.name])
            ):
                addresses[name] = UNMAPPED
        if watched is not None:
            self.emulate(processors=1000, watched=arrays[watched])
        status = self.call(problem, self.params(problem, addresses, size, **changed))
        if allocate is aligned:
            assert all(guards_hold(array) for array in arrays.values()), f"written outside of a tensor: {problem!r}"
        output = arrays["output"].view(NUMPY_TYPES[problem.type]).reshape(problem.rows, problem.out)
        return status, output


@functools.cache
def build_for_cpu(folder: Path) -> Kernels:
    """The kernels as fibers, built once; skips the test where there is no compiler."""
    if not shutil.which("g++"):
        import pytest  # Here, since benchmarks use the rest without it.

        pytest.skip("g++ is not installed")
    library = folder / "libkernels.so"
    compile_for_cpu(library, "-x", "c++", CORE / "experts.cu", HERE / "kernel_library.cpp")
    return Kernels(library)


def compile_for_cpu(library: Path, *arguments: str | Path) -> None:
    """Compiles sources against the emulated CUDA."""
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", *WARNINGS, "-Wno-unknown-pragmas"]
    # Undefined behaviour ends the process: loads of 16 bytes at odd places, sums that leave int32.
    command += ["-fsanitize=alignment,bool,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    command += ["-DMONOEDGE_EMULATION", f"-I{HERE / 'emulation'}", f"-I{CORE}", "-include", "cuda_runtime.h"]
    subprocess.run([*command, *arguments, "-o", library], check=True)


def build_for_gpu(folder: Path, nvcc: str) -> Kernels:
    """The kernels for the GPU at hand.

    Raises:
        subprocess.CalledProcessError: nvcc failed; what it said went to standard error.
    """
    library = folder / "libkernels.so"
    command = [nvcc, "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
    subprocess.run([*command, str(CORE / "experts.cu"), "-o", str(library)], check=True)
    return Kernels(library)


def passes(kernels: Kernels, data: Data, **how: Any) -> np.ndarray:
    """The output, which is as it should be."""
    status, output = kernels.run(data, **how)
    assert status == SUCCESS, data.problem
    check(data, output, *reference(data))
    return output
