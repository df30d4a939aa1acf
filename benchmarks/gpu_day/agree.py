"""The kernels, or the plugin that calls them, against float64: the first failure is told with its whole problem.

    python -m benchmarks.gpu_day.agree --kernels LIBRARY    # of plugins_trt/core/experts.cu
    python -m benchmarks.gpu_day.agree --plugin LIBRARY     # of plugin_call.cpp, linked to the plugin library

It needs numpy, ml_dtypes and the driver, and little else runs in its process: ``compute-sanitizer`` can watch it. The
problems, what float64 says of them and how far a result may be off are those of the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.gpu_day.memory import Gpu, Host
from plugins_trt.schema import EXPERT_LINEAR, FUSED_MOE, OPERATORS, PLUGIN_OPERATORS
from runtime.console.run import run
from runtime.errors import MonoedgeError
from tests.plugins_trt.kernels import SUCCESS, Kernels
from tests.plugins_trt.problems import KERNEL_TYPES, NUMPY_TYPES, Data, Problem, check, covering, make, reference

Memory = Gpu | Host
Addresses = dict[str, int]
Enqueue = Callable[[Addresses], int]
"""Enqueues with the tensors at these addresses; returns the status."""

SHAPES = (
    # Rows, and hidden and inter or out. Decode with one tile of rows and with two, prefill with small tiles and with
    # large ones (on up to 132 multiprocessors), and what only the generic path takes.
    (1, (128, 96)),
    (13, (136, 72)),
    (40, (128, 96)),
    (300, (64, 4224)),
    (7, (65, 66)),
)


def small_problems() -> list[Problem]:
    """Each form of each operator on each path, in both types: small, as tools that watch each access are slow."""
    return [
        Problem(_family(form.family), rows, *sizes, "alternating", kind, form.text, form.visual)
        for (rows, sizes), form, kind in itertools.product(SHAPES, PLUGIN_OPERATORS, KERNEL_TYPES)
    ]


def all_problems() -> list[Problem]:
    """The small ones, those of the model's sizes, and a set in which any two properties meet."""
    formats = dict.fromkeys((form.text, form.visual) for form in PLUGIN_OPERATORS)
    large = [
        Problem(operator, rows, 2048, 8192, "span", "bfloat16", *pair)
        for rows, operator, pair in itertools.product((1, 16, 300), OPERATORS, formats)
    ]
    return [*small_problems(), *large, *(problem for problem in covering() if _form(problem) is not None)]


def _family(name: str) -> object:
    return FUSED_MOE if name == FUSED_MOE.name else EXPERT_LINEAR


def _form(problem: Problem) -> str | None:
    """The name of the plugin's operator; None where there is none of these formats."""
    wanted = (problem.operator.name, problem.text, problem.visual)
    return next((form.name for form in PLUGIN_OPERATORS if (form.family, form.text, form.visual) == wanted), None)


class ThroughKernels:
    """Calls the kernels' own functions."""

    def __init__(self, library: Path) -> None:
        self._kernels = Kernels(library.absolute())

    def open(self, problem: Problem) -> tuple[int, Enqueue]:
        """Returns the bytes of workspace that a problem needs, and the call."""
        size = self._kernels.workspace(problem)
        return size, lambda at: self._kernels.call(problem, self._kernels.params(problem, at, size))


class ThroughPlugin:
    """Takes a node of the problem from the creator to ``enqueue``, as TensorRT does."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library.absolute()))
        self._library.monoedgePluginOpen.restype = ctypes.c_void_p
        self._library.monoedgePluginWorkspace.restype = ctypes.c_size_t
        self._nodes: list[ctypes.c_void_p] = []

    def open(self, problem: Problem) -> tuple[int, Enqueue]:
        """As above.

        Raises:
            MonoedgeError: the plugin refuses the node; why stands before it.
        """
        while self._nodes:
            self._library.monoedgePluginClose(self._nodes.pop())
        name = _form(problem)
        form = next(form for form in PLUGIN_OPERATORS if form.name == name)
        batch = 2 if problem.rows % 2 == 0 else 1
        sizes = (ctypes.c_int64 * 5)(batch, problem.rows // batch, problem.hidden, problem.size, problem.size)
        is_bfloat16 = problem.type == "bfloat16"
        node = self._library.monoedgePluginOpen(form.name.encode(), int(is_bfloat16), sizes)
        if not node:
            raise MonoedgeError("the plugin refuses the node")
        self._nodes.append(ctypes.c_void_p(node))

        def enqueue(at: Addresses) -> int:
            named = {name.replace(".", "_"): address for name, address in at.items()}
            inputs = (ctypes.c_void_p * len(form.inputs))(*(named[tensor.name] for tensor in form.inputs))
            output, workspace = (ctypes.c_void_p(at[name]) for name in ("output", "workspace"))
            return int(self._library.monoedgePluginEnqueue(self._nodes[-1], inputs, output, workspace, None))

        return int(self._library.monoedgePluginWorkspace(self._nodes[-1])), enqueue


def solve(through: ThroughKernels | ThroughPlugin, data: Data, memory: Memory, poisoned: bool) -> np.ndarray:
    """Runs a problem twice, and returns the output.

    Raises:
        MonoedgeError: the call or the GPU failed, or the second run gave other bits than the first.
    """
    problem = data.problem
    workspace, enqueue = through.open(problem)
    output_bytes = 2 * problem.rows * problem.out
    at = {"hidden_states": memory.put(data.hidden_states), "visual_mask": memory.put(data.mask)}
    for name, matrix in data.matrices.items():
        parts = {"": matrix.data, ".scale": matrix.scale, ".input_scale": matrix.input_scale}
        at |= {name + part: memory.put(array) for part, array in parts.items() if array is not None}
    outputs = []
    for _ in range(2):
        at["workspace"] = memory.empty(workspace, poisoned)
        at["output"] = memory.empty(output_bytes, poisoned)
        status = enqueue(at)
        if status != SUCCESS:
            raise MonoedgeError(f"the call returned {status}")
        outputs.append(memory.get(at["output"], output_bytes))
    if not np.array_equal(*outputs):
        raise MonoedgeError("a second run gave other bits")
    return outputs[0].view(NUMPY_TYPES[problem.type]).reshape(problem.rows, problem.out)


def main() -> None:
    """Reads the command line, solves all problems and tells which are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--kernels", type=Path, metavar="LIBRARY")
    way.add_argument("--plugin", type=Path, metavar="LIBRARY")
    parser.add_argument("--problems", choices=("small", "all"), default="small")
    parser.add_argument("--memory", choices=("gpu", "host"), default="gpu", help="host: the kernels are emulated")
    parser.add_argument("--unwritten", action="store_true", help="leave workspace and output as allocated")
    parser.add_argument("--most", type=int, metavar="N", help="only the first N problems")
    arguments = parser.parse_args()
    problems = (small_problems() if arguments.problems == "small" else all_problems())[: arguments.most]
    memory: Memory = Gpu() if arguments.memory == "gpu" else Host()
    through = ThroughKernels(arguments.kernels) if arguments.kernels else ThroughPlugin(arguments.plugin)
    wrong = []
    for problem in problems:
        data = make(problem)
        try:
            output = solve(through, data, memory, poisoned=not arguments.unwritten)
            check(data, output, *reference(data))
        except AssertionError as error:
            print(error, flush=True)
            wrong.append(problem)
        except MonoedgeError as error:
            # The context of a failed kernel is of no more use.
            raise MonoedgeError(f"{problem}: {error}") from None
        memory.clear()
    what = "the plugin's enqueue" if arguments.plugin else "the kernels"
    if wrong:
        raise MonoedgeError(f"{what}: {len(wrong)} of {len(problems)} problems do not agree with float64")
    print(f"{what}: {len(problems)} problems agree with float64, and twice with the same bits")


if __name__ == "__main__":
    run(main)
