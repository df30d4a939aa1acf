"""The kernels on a GPU, against float64: what emulation cannot tell, fragments and races first of all.

Tensors live on the device as torch tensors of bytes; the kernels are the same library as for a CPU, built by nvcc.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from plugins_trt.schema import EXPERT_LINEAR, FUSED_MOE, OPERATORS

from .kernels import POISON, SUCCESS, Kernels, build_for_gpu
from .problems import KERNEL_TYPES, NUMPY_TYPES, Data, Problem, check, make, mask_of, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    return build_for_gpu(tmp_path_factory.mktemp("kernels"), nvcc)


class OnDevice:
    """A problem's tensors on the device, and the call of them."""

    def __init__(self, kernels: Kernels, data: Data) -> None:
        self.kernels, self.problem = kernels, data.problem
        self.size = kernels.workspace(self.problem)
        self.tensors = {
            "workspace": self.poisoned(self.size),
            "output": self.poisoned(2 * self.problem.rows * self.problem.out),
        }
        self.put("hidden_states", data.hidden_states)
        self.put("visual_mask", data.mask)
        for name, matrix in data.matrices.items():
            self.put(name, matrix.data)
            for part in ("scale", "input_scale"):
                if getattr(matrix, part) is not None:
                    self.put(f"{name}.{part}", getattr(matrix, part))

    @staticmethod
    def poisoned(size: int) -> torch.Tensor:
        return torch.full((size,), POISON, dtype=torch.uint8, device="cuda")

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies into the tensor that is there, so that captured graphs see it, or into a new one."""
        source = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        if name in self.tensors:
            self.tensors[name].copy_(source)
        else:
            self.tensors[name] = source.cuda()

    def enqueue(self) -> None:
        """On torch's current stream."""
        addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        params = self.kernels.params(self.problem, addresses, self.size)
        assert self.kernels.call(self.problem, params, torch.cuda.current_stream().cuda_stream) == SUCCESS

    def output(self) -> np.ndarray:
        """Waits for the device."""
        array = self.tensors["output"].cpu().numpy().view(NUMPY_TYPES[self.problem.type])
        return array.reshape(self.problem.rows, self.problem.out)


@pytest.mark.parametrize("text", ["float", "w8a16", "w8a8"])
@pytest.mark.parametrize("kind", KERNEL_TYPES)
@pytest.mark.parametrize("sizes", [(2048, 8192), (1040, 208), (136, 72), (65, 66)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 128, 300, 1000])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_agrees_with_float64(
    kernels: Kernels, operator: object, rows: int, sizes: tuple[int, int], kind: str, text: str
) -> None:
    data = make(Problem(operator, rows, *sizes, "spans", kind, text))
    call = OnDevice(kernels, data)
    call.enqueue()
    check(data, call.output(), *reference(data))


@pytest.mark.parametrize("rows", [1, 16, 300, 4000])
@pytest.mark.parametrize("text", ["float", "w8a16", "w8a8"])
def test_same_bits_each_time(kernels: Kernels, rows: int, text: str) -> None:
    """No race that a hundred runs would show."""
    call = OnDevice(kernels, make(Problem(FUSED_MOE, rows, 2048, 8192, "alternating", text=text)))
    call.enqueue()
    first = call.tensors["output"].clone()
    for _ in range(100):
        call.tensors["output"].fill_(POISON)
        call.enqueue()
        assert torch.equal(call.tensors["output"], first)


@pytest.mark.parametrize("rows", [1, 9, 300])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_captured_graph_follows_rows_and_mask(kernels: Kernels, operator: object, rows: int) -> None:
    """Replayed with other rows and another mask, a graph gives what they need: nothing was decided at capture."""
    problem = Problem(operator, rows, 2048, 1024, "none", text="w8a8")
    data = make(problem)
    call = OnDevice(kernels, data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.enqueue()
    for mask in ("all", "span", "spans", "none"):
        data.mask = mask_of(mask, rows)
        data.hidden_states = data.hidden_states[::-1].copy()
        call.put("visual_mask", data.mask)
        call.put("hidden_states", data.hidden_states)
        call.tensors["output"].fill_(POISON)
        graph.replay()
        check(data, call.output(), *reference(data))


def test_an_expert_without_rows_is_not_read(kernels: Kernels) -> None:
    """An address where nothing is mapped: reading it would be an error of the device."""
    for rows in (4, 200):
        data = make(Problem(EXPERT_LINEAR, rows, 256, 512, "all"))
        call = OnDevice(kernels, data)
        addresses = {name: tensor.data_ptr() for name, tensor in call.tensors.items()} | {"text_weight": 4096}
        params = kernels.params(data.problem, addresses, call.size)
        assert kernels.call(data.problem, params, torch.cuda.current_stream().cuda_stream) == SUCCESS
        check(data, call.output(), *reference(data))
