"""The operators' kernels on a GPU, tried on small problems: what the plugin library's entries compute, and float64."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.backends.plugin_library import BUILD_COMMAND, plugin_library
from runtime.backends.tensorrt.plan import Buffer, place
from runtime.bundle.manifest import to_format
from runtime.doctor.plugin import KERNELS
from runtime.errors import BackendError

if TYPE_CHECKING:
    from runtime.backends.cuda.device import Device, Resource

Wide = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]

BFLOAT16 = 1
"""``Type::kBFloat16`` of ``plugins_trt/core/experts.h``."""


class Weight(ctypes.Structure):
    """``Weight`` of the same file."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("data", "scale", "inputScale"))


def _fields(sizes: tuple[str, str], matrices: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    return (
        ("type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", *sizes)),
        *((name, ctypes.c_void_p) for name in ("hiddenStates", "visualMask")),
        *((name, Weight) for name in matrices),
        *((name, ctypes.c_void_p) for name in ("output", "workspace")),
        ("workspaceSize", ctypes.c_size_t),
    )


class ExpertLinearParams(ctypes.Structure):
    """``ExpertLinearParams`` of the same file."""

    _fields_ = _fields(("in", "out"), ("text", "visual"))


class FusedMoeParams(ctypes.Structure):
    """``FusedMoeParams`` of the same file."""

    _fields_ = _fields(("hidden", "inter"), ("textGateUp", "textDown", "visualGateUp", "visualDown"))


PARAMS: dict[str, type[ctypes.Structure]] = {"FusedMoE": FusedMoeParams, "ExpertLinear": ExpertLinearParams}

FORMATS = ("float", "W8A16", "W8A8")
SHAPES = (
    # Text and visual rows, and hidden and inter or out. The first three load 16 bytes at a time: many rows, and one,
    # have kernels of their own. The last is what only the slow kernels take.
    ((48, 0), (128, 192)),
    ((60, 36), (128, 192)),
    ((1, 0), (128, 192)),
    ((4, 3), (65, 66)),
)
INPUT_SCALE = 2.5 / 127
"""Of W8A8: some activations saturate."""

BOUND = 2.0**-6
"""How far a number may be from float64, as a part of the largest of its row.

With u = 2⁻⁸, half a step of bf16 at most, rounding the output makes up to u. FusedMoE's product is rounded before
``down`` too, each element by up to u with a random sign. In the sum that is a normal error, with a deviation of at most
u / √3 of the output's own, which is below the row's largest number; 5 deviations are less than 3 u. W8A8 rounds the
product to int8 instead: where a float is by a tie, one more step of ``INPUT_SCALE`` is below 3 u here. Sums in float
are far more exact. A kernel that takes another expert, or leaves out one element of a sum, is mostly further off.
"""


@dataclass(frozen=True)
class Problem:
    """One call, with both experts in one format."""

    operator: str
    form: str
    rows: tuple[int, int]
    sizes: tuple[int, int]

    def __str__(self) -> str:
        (text, visual), (first, second) = self.rows, self.sizes
        return f"{self.operator}, {self.form}, {text} text and {visual} visual rows, sizes {first} and {second}"


PROBLEMS = tuple(Problem(*both, *shape) for both in itertools.product(KERNELS, FORMATS) for shape in SHAPES)


class _Matrix:
    """An expert's matrix [out, in]: the parts of ``Weight``, and what they stand for."""

    def __init__(self, generator: np.random.Generator, form: str, out: int, inside: int) -> None:
        self.parts: Arrays
        if form == "float":
            self.parts = {"data": _bits(generator.standard_normal((out, inside)) / np.sqrt(inside))}
            self._values = _widened(self.parts["data"])
            return
        # Their deviation is 74 steps.
        steps = generator.integers(-128, 128, (out, inside), np.int8)
        scale = (generator.uniform(0.5, 1.5, out) / 74 / np.sqrt(inside)).astype(np.float32)
        self.parts = {"data": steps, "scale": scale}
        self._values = steps * scale[:, None].astype(np.float64)
        if form == "W8A8":
            self.parts["inputScale"] = np.array([INPUT_SCALE], np.float32)

    def __call__(self, rows: Wide) -> Wide:
        """Returns the product with rows, quantized before as ``experts.h`` says."""
        if "inputScale" in self.parts:
            scale = self.parts["inputScale"]
            rows = np.clip(np.rint(rows.astype(np.float32) / scale), -128, 127) * scale.astype(np.float64)
        product: Wide = rows @ self._values.T
        return product


def kernels(device: Device | None = None, library: Any = None) -> int:  # noqa: ANN401 - has functions of any names
    """Runs both operators in each number format and compares them with float64.

    Args:
        device: instead of PyCUDA's.
        library: what has the entries, instead of the plugin library.

    Returns:
        How many problems agreed.

    Raises:
        BackendError: the library or the GPU fails, or a problem does not agree.
    """
    if device is None:
        from runtime.backends.cuda.pycuda import PyCudaDevice

        device = PyCudaDevice()
    library = open_kernels() if library is None else library
    with device:
        for seed, problem in enumerate(PROBLEMS):
            _try(device, library, problem, np.random.default_rng(seed))
    return len(PROBLEMS)


def open_kernels() -> ctypes.CDLL:
    """Finds the entries in the plugin library.

    Raises:
        BackendError: there is no library, or one without them.
    """
    path = plugin_library()
    try:
        library = ctypes.CDLL(str(path))
        for entry in KERNELS.values():
            getattr(library, entry).restype = ctypes.c_int
            getattr(library, f"{entry}Workspace").restype = ctypes.c_size_t
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} has no kernels to try ({error}): build it again with: {BUILD_COMMAND}") from None
    return library


def _try(device: Device, library: Any, problem: Problem, generator: np.random.Generator) -> None:  # noqa: ANN401
    """Raises a ``BackendError`` if a problem does not agree."""
    count, (inside, size) = sum(problem.rows), problem.sizes
    mask = generator.permutation(np.repeat([False, True], problem.rows))
    states = _bits(generator.standard_normal((count, inside)))
    is_moe = problem.operator == "FusedMoE"
    shapes = {"GateUp": (2 * size, inside), "Down": (inside, size)} if is_moe else {"": (size, inside)}
    experts = [{name: _Matrix(generator, problem.form, *shape) for name, shape in shapes.items()} for _ in problem.rows]
    expected = np.empty((count, inside if is_moe else size))
    for expert, chosen in zip(experts, (~mask, mask), strict=True):
        expected[chosen] = (_fused_moe(**expert) if is_moe else expert[""])(_widened(states[chosen]))
    matrices = {
        f"{kind}{name}": matrix.parts
        for kind, expert in zip(("text", "visual"), experts, strict=True)
        for name, matrix in expert.items()
    }
    got = _widened(
        _computed(device, library, problem, {"hiddenStates": states, "visualMask": mask}, matrices, expected)
    )
    with np.errstate(invalid="ignore"):
        parts = np.abs(got - expected) / np.abs(expected).max(axis=1, keepdims=True)
    if wrong := int(np.count_nonzero(~(parts <= BOUND))):
        raise BackendError(
            f"{problem}: {wrong:,} of {parts.size:,} numbers differ from float64, by up to "
            f"{np.nan_to_num(parts, nan=np.inf).max():.2g} of their row's largest, where rounding makes at most "
            f"{BOUND:.2g}: build the library again with: {BUILD_COMMAND}"
        )


def _fused_moe(GateUp: _Matrix, Down: _Matrix) -> Callable[[Wide], Wide]:  # noqa: N803 - as the C struct names them
    def compute(rows: Wide) -> Wide:
        gate, up = np.split(GateUp(rows), 2, axis=1)
        return Down(gate / (1 + np.exp(-gate)) * up)

    return compute


def _computed(
    device: Device,
    library: Any,  # noqa: ANN401
    problem: Problem,
    inputs: Arrays,
    matrices: dict[str, Arrays],
    like: Wide,
) -> npt.NDArray[np.uint16]:
    """Calls the entry; returns the output's bits. What the kernel leaves out is NaN."""
    count, entry = sum(problem.rows), KERNELS[problem.operator]
    numbers = [ctypes.c_int64(number) for number in (count, *problem.sizes)]
    workspace = getattr(library, f"{entry}Workspace")(*numbers)
    arrays = inputs | {f"{name}.{part}": array for name, parts in matrices.items() for part, array in parts.items()}
    arrays["output"] = np.full(like.shape, 0xFFFF, np.uint16)
    buffers = {name: Buffer(array.dtype, array.shape) for name, array in arrays.items()}
    offsets, total = place(buffers | {"workspace": Buffer(np.dtype(np.uint8), (workspace,))})
    held: list[Resource] = []
    try:
        host = device.allocate_host(offsets["workspace"])
        held.append(host)
        memory = device.allocate(total)
        held.append(memory)
        views = {name: host.array[offsets[name] :][: array.nbytes] for name, array in arrays.items()}
        for name, array in arrays.items():
            views[name][:] = array.reshape(-1).view(np.uint8)
        at = {name: memory.address + offset for name, offset in offsets.items()}
        params = PARAMS[problem.operator](BFLOAT16, count, *problem.sizes, at["hiddenStates"], at["visualMask"])
        for name, parts in matrices.items():
            setattr(params, name, Weight(**{part: at[f"{name}.{part}"] for part in parts}))
        params.output, params.workspace, params.workspaceSize = at["output"], at["workspace"], workspace
        device.upload(host.array, memory.address)
        if status := getattr(library, entry)(ctypes.byref(params), ctypes.c_void_p(device.stream)):
            raise BackendError(f"{problem}: CUDA error {status}")
        device.download(at["output"], views["output"])
        done = device.event()
        held.append(done)
        done.record()
        done.wait()
        return views["output"].view(np.uint16).reshape(like.shape).copy()
    finally:
        device.release(held)


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Returns numbers in bf16."""
    bits = np.empty(values.shape, np.uint16)
    to_format(values.astype(np.float32), bits)
    return bits


def _widened(bits: npt.NDArray[np.uint16]) -> Wide:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
