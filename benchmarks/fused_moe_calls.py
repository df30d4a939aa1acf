"""What ``benchmarks/fused_moe.py`` times: our kernels and PyTorch's ways, one layer or many one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from fused_moe_cases import FORMATS, Case, Experts, Tensor

from plugins_trt.schema import EXPERT_LINEAR, FUSED_MOE
from runtime.errors import MonoedgeError
from tests.plugins_trt.kernels import SUCCESS, Kernels
from tests.plugins_trt.problems import Problem

Call = Callable[[], Tensor]
Layer = Callable[[Case], Tensor]


def swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert."""
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def both(case: Case) -> Tensor:
    """Both experts on all rows, blended."""
    weights = case.experts.weights
    visual = case.mask[:, None].to(case.rows.dtype)
    text_rows = swiglu(case.rows, weights["text_gate_up"], weights["text_down"])
    visual_rows_ = swiglu(case.rows, weights["visual_gate_up"], weights["visual_down"])
    return text_rows * (1 - visual) + visual_rows_ * visual


def gather(case: Case, indices: dict[str, Tensor]) -> Tensor:
    """Each expert on its rows."""
    output, weights = torch.empty_like(case.rows), case.experts.weights
    for expert, index in indices.items():
        if len(index):
            chosen = case.rows.index_select(0, index)
            result = swiglu(chosen, weights[f"{expert}_gate_up"], weights[f"{expert}_down"])
            output.index_copy_(0, index, result)
    return output


def dense(case: Case) -> Tensor:
    """The text expert on all rows."""
    return swiglu(case.rows, case.experts.weights["text_gate_up"], case.experts.weights["text_down"])


def products(case: Case) -> Tensor:
    """The two matrix products of the text expert, and nothing between them: what cuBLAS can do at best."""
    weights = case.experts.weights
    inter = weights["text_down"].shape[1]
    return F.linear(F.linear(case.rows, weights["text_gate_up"])[:, :inter], weights["text_down"])


def torch_down(experts: Experts, product: Tensor) -> Tensor:
    """The text expert's ``down`` alone."""
    return F.linear(product, experts.weights["text_down"])


def torch_layers(case: Case) -> dict[str, Layer]:
    """What PyTorch computes, by name; which rows are whose is that of this case."""
    indices = {"visual": case.index(True), "text": case.index(False)}
    return {"both": both, "gather": lambda case: gather(case, indices), "dense": dense}


def our_call(
    case: Case, text: str, kernels: Kernels, output: Tensor | None = None, workspace: Tensor | None = None
) -> Call:
    """Our kernels on the same tensors, with the text expert in a format of ``FORMATS``.

    Args:
        case: rows and weights.
        text: the format.
        kernels: the library.
        output: like the rows; written by each call. None: one of its own.
        workspace: of ``workspace_of``, which calls that run one after the other may share. None: one of its own.
    """
    rows, hidden = case.rows.shape
    inter = case.experts.weights["text_down"].shape[1]
    problem = Problem(FUSED_MOE, rows, hidden, inter, type="bfloat16", text=FORMATS[text])
    held = _matrices(case.experts, text, {name: name for name in case.experts.weights})
    return _call(problem, kernels, held, case.rows, case.mask, output, workspace)


def our_down(experts: Experts, text: str, kernels: Kernels, product: Tensor) -> Call:
    """The text expert's ``down`` alone, as an ExpertLinear of rows without a picture."""
    rows, inter = product.shape
    hidden = experts.weights["text_down"].shape[0]
    problem = Problem(EXPERT_LINEAR, rows, inter, hidden, type="bfloat16", text=FORMATS[text])
    held = _matrices(experts, text, {"text_weight": "text_down", "visual_weight": "visual_down"})
    mask = torch.zeros(rows, dtype=torch.bool, device=product.device)
    return _call(problem, kernels, held, product, mask, product.new_empty((rows, hidden)), None)


def workspace_of(case: Case, kernels: Kernels) -> Tensor:
    """What calls with these sizes need, in any format."""
    rows, hidden = case.rows.shape
    problem = Problem(FUSED_MOE, rows, hidden, case.experts.weights["text_down"].shape[1])
    return torch.empty(kernels.workspace(problem), dtype=torch.uint8, device=case.rows.device)


def _matrices(experts: Experts, text: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of the operator's inputs, with the names that the layer has for them."""
    held = {name: experts.weights[of] for name, of in names.items()}
    if text != "bf16":
        parts = ("", ".scale", ".input_scale")[: 3 if text == "w8a8" else 2]
        quantized = {name: of for name, of in names.items() if of in experts.quantized}
        held |= {name + part: experts.quantized[of + part] for name, of in quantized.items() for part in parts}
    return held


def _call(
    problem: Problem,
    kernels: Kernels,
    matrices: dict[str, Tensor],
    rows: Tensor,
    mask: Tensor,
    output: Tensor | None,
    workspace: Tensor | None,
) -> Call:
    size = kernels.workspace(problem)
    target = torch.empty_like(rows) if output is None else output
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.uint8, device=rows.device)
    held = {"hidden_states": rows, "visual_mask": mask, "output": target, "workspace": workspace, **matrices}
    params = kernels.params(problem, {name: tensor.data_ptr() for name, tensor in held.items()}, size)

    def call() -> Tensor:
        held["output"]  # what the struct points to lives as long as this function
        stream = torch.cuda.current_stream().cuda_stream if target.is_cuda else 0
        status = kernels.call(problem, params, stream)
        if status != SUCCESS:
            raise MonoedgeError(f"the kernels returned CUDA error {status} for {problem}")
        return target

    return call


# Layers one after the other -------------------------------------------------------------------------------------------


def passes(cases: Sequence[Case], layers: int) -> Iterator[tuple[Case, bool]]:
    """The layers of a chain, and whether each begins with the rows again instead of the result before it.

    A chain goes through the cases again and again. Each time it begins with the rows: the result of a layer grows with
    the square of what goes in, so that a long chain would end in zeros or infinities, which are computed faster.
    """
    for index in range(layers):
        yield cases[index % len(cases)], index % len(cases) == 0


def torch_chain(cases: Sequence[Case], layer: Layer, layers: int) -> Call:
    """One of PyTorch's ways in each layer."""

    def call() -> Tensor:
        rows = cases[0].rows
        for case, begins in passes(cases, layers):
            rows = layer(Case(case.rows if begins else rows, case.mask, case.experts))
        return rows

    return call


def our_chain(cases: Sequence[Case], text: str, kernels: Kernels, layers: int) -> Call:
    """Our kernels in each layer, each reading what the one before wrote; two outputs and a workspace are shared."""
    outputs = [torch.empty_like(cases[0].rows) for _ in range(2)]
    workspace, calls = workspace_of(cases[0], kernels), []
    for case, begins in passes(cases, layers):
        rows = case.rows if begins else outputs[1 - len(calls) % 2]
        here = Case(rows, case.mask, case.experts)
        calls.append(our_call(here, text, kernels, outputs[len(calls) % 2], workspace))
    return in_turn(calls, layers)


def in_turn(calls: Sequence[Call], layers: int) -> Call:
    """So many calls, each in its turn; the last one's result."""
    return lambda: [calls[index % len(calls)]() for index in range(layers)][-1]
