"""The plugin from its creator to the answer, with TensorRT's part played by ``steps.cpp``.

Real: the plugin's own sources, NVIDIA's headers of TensorRT, and the kernels' sources. Not real: TensorRT, whose calls
come in the order of its documentation; and the GPU, since the kernels run on a CPU, on pointers of the host. Neither
nvcc nor CUDA's headers are needed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins_trt.schema import Operator

from ..kernels import CORE, Kernels, aligned, build_for_cpu, compile_for_cpu, guards_hold, placed
from ..problems import NUMPY_TYPES

HERE = Path(__file__).resolve().parent
FETCHED = HERE.parents[2] / "build/tensorrt_headers/kernel_lens/include/tensorrt"
HEADERS = Path(os.environ["TENSORRT_ROOT"]) / "include" if "TENSORRT_ROOT" in os.environ else FETCHED
"""TensorRT's, by default those that ``make test`` fetches, of 10.14."""
TYPES = {"float32": 0, "float16": 1, "int8": 2, "bool": 4, "bfloat16": 7}
"""``nvinfer1::DataType``."""
LINEAR, HWC8 = 0, 3
"""``nvinfer1::TensorFormat``."""
ERROR, WARNING, VERBOSE = 1, 2, 4
"""``nvinfer1::ILogger::Severity``."""
NODE = "layers.0.test"
_RANKS = 8


class _Tensor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "format", "rank")),
        *((name, ctypes.c_int64 * _RANKS) for name in ("shape", "least", "most")),
    )


@dataclass(frozen=True)
class Tensor:
    """What TensorRT tells of a tensor. ``most`` is its largest shape in a profile, by default ``shape``."""

    type: str
    shape: tuple[int, ...]
    most: tuple[int, ...] | None = None
    format: int = LINEAR


Tensors = Mapping[str, Tensor]
"""A node's inputs and then ``output``, in the order of the definition."""


def tensors_of(operator: Operator, element: str, sizes: Mapping[str, int], most: Mapping[str, int]) -> Tensors:
    """The tensors of a node.

    Args:
        operator: which.
        element: what T is.
        sizes: the definition's named dimensions, -1 for what only the profile knows.
        most: those that differ in the profile.
    """

    def shape(names: Sequence[str], numbers: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(2 * numbers[name[2:]] if name.startswith("2*") else numbers[name] for name in names)

    return {
        tensor.name: Tensor(
            element if tensor.type == "T" else tensor.type,
            shape(tensor.shape, sizes),
            shape(tensor.shape, {**sizes, **most}),
        )
        for tensor in (*operator.inputs, *operator.outputs)
    }


def changed(tensors: Tensors, name: str, **values: Any) -> Tensors:
    """The same with one tensor that is not as it should be."""
    return {**tensors, name: replace(tensors[name], **values)}


def _packed(tensors: Tensors) -> tuple[Any, int]:
    """For C: the tensors, and how many are inputs."""

    def sizes(shape: Sequence[int]) -> Any:
        return (ctypes.c_int64 * _RANKS)(*shape)

    every = [
        _Tensor(
            TYPES[tensor.type],
            tensor.format,
            len(tensor.shape),
            sizes(tensor.shape),
            sizes([1] * len(tensor.shape)),
            sizes(tensor.shape if tensor.most is None else tensor.most),
        )
        for tensor in tensors.values()
    ]
    return (_Tensor * len(every))(*every), len(every) - 1


class Plugin:
    """An object of the plugin library."""

    def __init__(self, steps: Steps, address: int | None) -> None:
        assert address, steps.log()
        self.steps, self._address = steps, ctypes.c_void_p(address)

    def supports(self, tensors: Tensors) -> list[str]:
        """Which tensors may be as they are."""
        packed, inputs = _packed(tensors)
        supports = self.steps.library.stepsSupports
        supports.restype = ctypes.c_bool
        return [name for i, name in enumerate(tensors) if supports(self._address, i, packed, inputs)]

    def configure(self, tensors: Tensors) -> int:
        """The status."""
        return int(self.steps.library.stepsConfigure(self._address, *_packed(tensors)))

    def workspace(self, tensors: Tensors) -> int:
        """Bytes."""
        return int(self.steps.library.stepsWorkspace(self._address, *_packed(tensors)))

    def shape_change(self, tensors: Tensors) -> int:
        """The status."""
        return int(self.steps.library.stepsShapeChange(self._address, *_packed(tensors)))

    def enqueue(self, tensors: Tensors, addresses: Mapping[str, int], workspace: int) -> int:
        """The status. ``addresses`` are those of the tensors."""
        packed, inputs = _packed(tensors)
        places = (ctypes.c_void_p * inputs)(*(addresses[name] for name in list(tensors)[:-1]))
        where = (ctypes.c_void_p(addresses["output"]), ctypes.c_void_p(workspace))
        return int(self.steps.library.stepsEnqueue(self._address, packed, inputs, places, *where))

    def attach(self) -> Plugin:
        """The object for one execution context."""
        return Plugin(self.steps, self.steps.library.stepsAttach(self._address))

    def clone(self) -> Plugin:
        """A copy."""
        return Plugin(self.steps, self.steps.library.stepsClone(self._address))

    def serialize(self) -> int:
        """The address of the fields that a plan keeps."""
        return int(self.steps.library.stepsSerialize(self._address))

    def release(self) -> None:
        """Ends it."""
        self.steps.library.stepsRelease(self._address)


class Steps:
    """The plugin library and ``steps.cpp`` in one."""

    def __init__(self, path: Path, kernels: Kernels) -> None:
        self.path, self.library, self.kernels = path, ctypes.CDLL(str(path)), kernels
        for name in ("Create", "Clone", "Attach", "Serialize", "Workspace"):
            getattr(self.library, f"steps{name}").restype = ctypes.c_size_t
        self.library.stepsLog.restype = ctypes.c_char_p
        self.log()
        self.use_logger(used=True)
        kernels.emulate()

    def use_logger(self, *, used: bool) -> None:
        """Whether TensorRT has a logger for the library."""
        self.library.stepsUseLogger(ctypes.c_bool(used))

    def log(self) -> list[tuple[int, str]]:
        """What was logged since the last time: severities and lines."""
        lines = self.library.stepsLog().decode().splitlines()
        return [(int(line[0]), line[2:]) for line in lines]

    def errors(self) -> list[str]:
        """The same, but only what is worse than information."""
        return [line for severity, line in self.log() if severity <= WARNING]

    def create(self, operator: Operator, fields: int | None = None, node: str = NODE) -> Plugin:
        """A plugin as the parser makes it, or with fields as a plan does."""
        make = self.library.stepsCreate
        return Plugin(self, make(operator.name.encode(), node.encode(), ctypes.c_void_p(fields)))

    def engine(self, operator: Operator, *profiles: Tensors, node: str = NODE) -> tuple[Plugin, int]:
        """Builds a node, writes it to a plan and reads it again.

        Returns:
            The plugin of the engine, and its workspace in bytes. Nothing of what built it is left.
        """
        parsed = self.create(operator, node=node)
        built = parsed.clone()
        parsed.release()
        workspace = 0
        for tensors in profiles:
            assert built.supports(tensors) == list(tensors)
            assert built.configure(tensors) == 0, self.log()
            workspace = max(workspace, built.workspace(tensors))
        fields = built.serialize()
        built.release()
        engine = self.create(operator, fields, node)
        self.library.stepsForget(ctypes.c_void_p(fields))
        assert self.errors() == []
        return engine, workspace


class Context:
    """An execution context of an engine of one node, with a workspace of its own and guards around all memory."""

    def __init__(self, engine: Plugin, workspace: int) -> None:
        self.plugin, self._workspace = engine.attach(), aligned(workspace)

    def bind(
        self, tensors: Tensors, arrays: Mapping[str, np.ndarray], offsets: Mapping[str, int] | None = None
    ) -> dict[str, np.ndarray]:
        """Copies of the inputs, and the output, each ``offsets`` bytes behind an aligned address."""
        offsets = offsets or {}
        bound = {name: placed(array, offsets.get(name, 0)) for name, array in arrays.items()}
        output = tensors["output"]
        kind = NUMPY_TYPES[output.type]
        memory = aligned(int(np.prod(output.shape)) * kind.itemsize, offsets.get("output", 0))
        return {**bound, "output": memory.view(kind).reshape(output.shape)}

    def enqueue(self, tensors: Tensors, bound: Mapping[str, np.ndarray]) -> int:
        """The status; nothing is written outside of output and workspace."""
        addresses = {name: array.ctypes.data for name, array in bound.items()}
        status = self.plugin.enqueue(tensors, addresses, self._workspace.ctypes.data)
        assert all(guards_hold(array) for array in (*bound.values(), self._workspace))
        return status

    def run(
        self, tensors: Tensors, arrays: Mapping[str, np.ndarray], offsets: Mapping[str, int] | None = None
    ) -> np.ndarray:
        """The output of a call that begins with a change of shapes."""
        bound = self.bind(tensors, arrays, offsets)
        assert self.plugin.shape_change(tensors) == 0, self.plugin.steps.log()
        assert self.enqueue(tensors, bound) == 0, self.plugin.steps.log()
        return bound["output"]


@functools.cache
def _compiled(folder: Path) -> Path:
    kernels = folder / "libkernels.so"
    library, sources = folder / "libsteps.so", sorted(CORE.parent.glob("trt/*.cpp"))
    compile_for_cpu(library, "-isystem", HEADERS, *sources, HERE / "steps.cpp", kernels)
    return library


def build_steps(folder: Path) -> Steps:
    """Compiles the plugin for a CPU, once; skips the test where something for that is missing."""
    if not (HEADERS / "NvInferRuntime.h").is_file():
        pytest.skip(f"TensorRT's headers are not in {HEADERS}; this fetches them: make build/tensorrt_headers")
    kernels = build_for_cpu(folder)
    return Steps(_compiled(folder), kernels)
