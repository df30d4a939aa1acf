"""What ``benchmarks/fused_moe.py`` times, on any device: rows and weights, our kernels, and PyTorch's ways."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plugins_trt.schema import FUSED_MOE  # noqa: E402
from runtime.errors import MonoedgeError  # noqa: E402
from tests.plugins_trt.kernels import SUCCESS, Kernels  # noqa: E402
from tests.plugins_trt.problems import Problem  # noqa: E402

TILE = 256
"""Visual tokens of a tile."""

FORMATS = {"bf16": "float", "w8a16": "w8a16", "w8a8": "w8a8"}
"""Formats of the text expert, by the name that the kernels' problems have for each. The visual expert is in bf16."""

ERRORS = {"bf16": 0.01, "w8a16": 0.01, "w8a8": 0.03}
"""Root mean square of what a result may be off, relative to the result's. A bfloat16 is off by 2⁻⁹ of itself, where
rounding is of any size up to that by 0.002 in the root mean square; w8a8 may round the product of gate and up to the
next step of INT8 where it was rounded to bfloat16 before."""

Tensor = torch.Tensor
Call = Callable[[], Tensor]


def visual_rows(rows: int) -> int:
    """How many of the rows are visual: whole tiles, with at least one row of text behind them."""
    return (rows - 1) // TILE * TILE


@dataclass
class Case:
    """Rows and weights on a device.

    Attributes:
        rows: [rows, hidden].
        mask: bool [rows], true for visual rows.
        weights: ``text_gate_up`` [2 · inter, hidden], ``text_down`` [hidden, inter], and the visual expert's.
        quantized: INT8 of the text expert's, with scales: ``text_gate_up``, ``.scale`` [out], ``.input_scale`` [1].
    """

    rows: Tensor
    mask: Tensor
    weights: dict[str, Tensor]
    quantized: dict[str, Tensor] = field(default_factory=dict)

    def index(self, visual: bool) -> Tensor:
        """Which rows are visual, or which are not."""
        return torch.nonzero(self.mask == visual).flatten()


def make_case(rows: int, hidden: int, inter: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Weights and rows of sizes like a trained model's, so that gate, up and product are about 1."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights, quantized = {}, {}
    for expert in ("text", "visual"):
        for name, shape in (("gate_up", (2 * inter, hidden)), ("down", (hidden, inter))):
            weight = normal(*shape) / shape[1] ** 0.5
            weights[f"{expert}_{name}"] = weight.to(device, dtype)
            if expert == "text":
                scale = weight.abs().amax(dim=1) / 127
                values = (weight / scale[:, None]).round().to(torch.int8)
                quantized[f"text_{name}"] = values.to(device)
                quantized[f"text_{name}.scale"] = scale.to(device)
                quantized[f"text_{name}.input_scale"] = torch.tensor([6 / 127], device=device)
    mask = torch.arange(rows) < visual_rows(rows)
    return Case(normal(rows, hidden).to(device, dtype), mask.to(device), weights, quantized)


# Contenders -----------------------------------------------------------------------------------------------------------


def swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert."""
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def both(case: Case) -> Tensor:
    """Both experts on all rows, blended."""
    weights = case.weights
    visual = case.mask[:, None].to(case.rows.dtype)
    text_rows = swiglu(case.rows, weights["text_gate_up"], weights["text_down"])
    visual_rows_ = swiglu(case.rows, weights["visual_gate_up"], weights["visual_down"])
    return text_rows * (1 - visual) + visual_rows_ * visual


def gather(case: Case, indices: dict[str, Tensor]) -> Tensor:
    """Each expert on its rows."""
    output = torch.empty_like(case.rows)
    for expert, index in indices.items():
        if len(index):
            chosen = case.rows.index_select(0, index)
            result = swiglu(chosen, case.weights[f"{expert}_gate_up"], case.weights[f"{expert}_down"])
            output.index_copy_(0, index, result)
    return output


def dense(case: Case) -> Tensor:
    """The text expert on all rows."""
    return swiglu(case.rows, case.weights["text_gate_up"], case.weights["text_down"])


def torch_calls(case: Case) -> dict[str, Call]:
    """What PyTorch computes, by name."""
    indices = {"visual": case.index(True), "text": case.index(False)}
    return {"both": lambda: both(case), "gather": lambda: gather(case, indices), "dense": lambda: dense(case)}


def our_call(case: Case, text: str, kernels: Kernels) -> Call:
    """Our kernels on the same tensors, with the text expert in a format of ``FORMATS``."""
    rows, hidden = case.rows.shape
    inter = case.weights["text_down"].shape[1]
    problem = Problem(FUSED_MOE, rows, hidden, inter, type="bfloat16", text=FORMATS[text])
    size = kernels.workspace(problem)
    output = torch.empty_like(case.rows)
    held = {
        "hidden_states": case.rows,
        "visual_mask": case.mask,
        "output": output,
        "workspace": torch.empty(size, dtype=torch.uint8, device=case.rows.device),
        **case.weights,
    }
    if text != "bf16":
        parts = ("", ".scale", ".input_scale")[: 3 if text == "w8a8" else 2]
        held |= {name + part: case.quantized[name + part] for name in ("text_gate_up", "text_down") for part in parts}
    params = kernels.params(problem, {name: tensor.data_ptr() for name, tensor in held.items()}, size)

    def call() -> Tensor:
        held["output"]  # what the struct points to lives as long as this function
        stream = torch.cuda.current_stream().cuda_stream if output.is_cuda else 0
        status = kernels.call(problem, params, stream)
        if status != SUCCESS:
            raise MonoedgeError(f"the kernels returned CUDA error {status} for {problem}")
        return output

    return call


# Right before fast ----------------------------------------------------------------------------------------------------


def expected(case: Case, text: str) -> Tensor:
    """float32, from the numbers that the weights stand for, each row by its expert."""
    rows, output = case.rows.float(), torch.empty_like(case.rows, dtype=torch.float32)
    for expert, visual in (("text", False), ("visual", True)):
        index = case.index(visual)
        quantized = expert == "text" and text != "bf16"
        chosen = rows[index]
        for name in ("gate_up", "down"):
            key = f"{expert}_{name}"
            weight = case.weights[key].float()
            if quantized:
                weight = case.quantized[key].float() * case.quantized[f"{key}.scale"][:, None]
                if text == "w8a8":
                    step = case.quantized[f"{key}.input_scale"]
                    chosen = (chosen / step).round().clamp(-128, 127) * step
            chosen = F.linear(chosen, weight)
            if name == "gate_up":
                gate, up = chosen.chunk(2, dim=-1)
                chosen = F.silu(gate) * up
        output[index] = chosen
    return output


def check(case: Case, text: str, name: str, got: Tensor) -> None:
    """Compares a contender's result with float32.

    Raises:
        MonoedgeError: it is wrong.
    """
    if name == "dense":
        case = Case(case.rows, torch.zeros_like(case.mask), case.weights, case.quantized)
    right = expected(case, text)
    error = float((got.float() - right).square().mean().sqrt() / right.square().mean().sqrt())
    # Written so that NaN fails.
    if not error <= ERRORS[text]:
        raise MonoedgeError(
            f"{name} {text} with {len(case.rows)} rows is wrong: it is off by {error:.2g} of the result, expected at "
            f"most {ERRORS[text]}; nothing is timed"
        )


def weight_bytes(case: Case, text: str) -> int:
    """Bytes of weights that a call must read: those of the experts that have rows."""
    used = [expert for expert, visual in (("text", False), ("visual", True)) if len(case.index(visual))]
    return sum(
        (case.quantized if expert == "text" and text != "bf16" else case.weights)[f"{expert}_{name}"].nbytes
        for expert in used
        for name in ("gate_up", "down")
    )
