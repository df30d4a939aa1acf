"""The rows and weights that ``benchmarks/fused_moe.py`` times layers of, on any device, and what is right for them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.errors import MonoedgeError  # noqa: E402

TILE = 256
"""Visual tokens of a tile."""

FORMATS = {"bf16": "float", "w8a16": "w8a16", "w8a8": "w8a8"}
"""Formats of the text expert, by the name that the kernels' problems have for each. The visual expert is in bf16."""

ERRORS = {"bf16": 0.01, "w8a16": 0.01, "w8a8": 0.03}
"""Root mean square of what a result may be off, relative to the result's. A bfloat16 is off by 2⁻⁹ of itself, where
rounding is of any size up to that by 0.002 in the root mean square; w8a8 may round the product of gate and up to the
next step of INT8 where it was rounded to bfloat16 before."""

Tensor = torch.Tensor


def visual_rows(rows: int) -> int:
    """How many of the rows are visual: whole tiles, with at least one row of text behind them."""
    return (rows - 1) // TILE * TILE


SIZE_KEPT = 1.68
"""What makes a product of gate and up as large as the rows again: E[(silu(g) · u)²] is 0.356 for normal g and u."""


@dataclass
class Experts:
    """Weights of a layer.

    Attributes:
        weights: ``text_gate_up`` [2 · inter, hidden], ``text_down`` [hidden, inter], and the visual expert's.
        quantized: INT8 of the text expert's, with scales: ``text_gate_up``, ``.scale`` [out], ``.input_scale`` [1].
    """

    weights: dict[str, Tensor]
    quantized: dict[str, Tensor]


@dataclass
class Case:
    """Rows and the weights of a layer, on a device.

    Attributes:
        rows: [rows, hidden].
        mask: bool [rows], true for visual rows.
        experts: of the layer.
    """

    rows: Tensor
    mask: Tensor
    experts: Experts

    def index(self, visual: bool) -> Tensor:
        """Which rows are visual, or which are not."""
        return torch.nonzero(self.mask == visual).flatten()


def make_experts(hidden: int, inter: int, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Experts:
    """Weights of sizes like a trained model's: gate and up are about 1 for rows of 1, and so is the result."""
    generator = torch.Generator(device).manual_seed(seed)
    weights, quantized = {}, {}
    for expert in ("text", "visual"):
        for name, shape, size in (("gate_up", (2 * inter, hidden), 1.0), ("down", (hidden, inter), SIZE_KEPT)):
            weight = torch.randn(shape, generator=generator, device=device) * (size / shape[1] ** 0.5)
            weights[f"{expert}_{name}"] = weight.to(dtype)
            if expert == "text":
                scale = weight.abs().amax(dim=1) / 127
                quantized[f"text_{name}"] = (weight / scale[:, None]).round().to(torch.int8)
                quantized[f"text_{name}.scale"] = scale
                quantized[f"text_{name}.input_scale"] = torch.tensor([6 / 127], device=device)
    return Experts(weights, quantized)


def make_case(rows: int, experts: Experts) -> Case:
    """Rows of one image span of whole tiles with text behind it, for a layer."""
    weight = experts.weights["text_gate_up"]
    generator = torch.Generator(weight.device).manual_seed(rows)
    values = torch.randn((rows, weight.shape[1]), generator=generator, device=weight.device)
    mask = torch.arange(rows, device=weight.device) < visual_rows(rows)
    return Case(values.to(weight.dtype), mask, experts)


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
            weight = case.experts.weights[key].float()
            if quantized:
                weight = case.experts.quantized[key].float() * case.experts.quantized[f"{key}.scale"][:, None]
                if text == "w8a8":
                    step = case.experts.quantized[f"{key}.input_scale"]
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
        case = Case(case.rows, torch.zeros_like(case.mask), case.experts)
    right = expected(case, text)
    error = float((got.float() - right).square().mean().sqrt() / right.square().mean().sqrt())
    # Written so that NaN fails.
    if not error <= ERRORS[text]:
        raise MonoedgeError(
            f"{name} {text} with {len(case.rows)} rows is wrong: it is off by {error:.2g} of the result, expected at "
            f"most {ERRORS[text]}; nothing is timed"
        )


def weight_bytes(case: Case, text: str) -> int:
    """Bytes of weights that a layer must read: those of the experts that have rows."""
    used = [expert for expert, visual in (("text", False), ("visual", True)) if len(case.index(visual))]
    return sum(
        _weight(case.experts, f"{expert}_{name}", text).nbytes for expert in used for name in ("gate_up", "down")
    )


def down_bytes(experts: Experts, text: str) -> int:
    """The same of the text expert's ``down`` alone."""
    return _weight(experts, "text_down", text).nbytes


def _weight(experts: Experts, key: str, text: str) -> Tensor:
    return (experts.quantized if text != "bf16" and key in experts.quantized else experts.weights)[key]
