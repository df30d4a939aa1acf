"""The operator family in PyTorch: the arithmetic of ``plugins_trt.schema`` in eager mode, one ONNX node in a trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.compiler import is_exporting

from export.model.standard_ops import node
from plugins_trt.schema import DOMAIN, EXPERT_LINEAR, FUSED_MOE, VERSION, Operator


def fused_moe(hidden_states: torch.Tensor, visual_mask: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Computes ``FusedMoE``; inputs and output are those of ``plugins_trt.schema.FUSED_MOE``."""
    return _routed(FUSED_MOE, _swiglu, hidden_states, visual_mask, *weights)


def expert_linear(hidden_states: torch.Tensor, visual_mask: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Computes ``ExpertLinear``; inputs and output are those of ``plugins_trt.schema.EXPERT_LINEAR``."""
    return _routed(EXPERT_LINEAR, F.linear, hidden_states, visual_mask, *weights)


def _swiglu(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _routed(
    operator: Operator, expert: Callable[..., torch.Tensor], x: torch.Tensor, mask: torch.Tensor, *weights: torch.Tensor
) -> torch.Tensor:
    """Computes each row with its own expert alone. Never a blend: inf · 0 of the expert not wanted would be NaN."""
    output = x.new_empty(*x.shape[:-1], weights[-1].shape[0])
    if is_exporting():
        attributes = dict(sorted(operator.attributes.items()))
        return node(f"{DOMAIN}::{operator.name}", [x, mask, *weights], attributes, output, VERSION)
    half = len(weights) // 2
    output[~mask] = expert(x[~mask], *weights[:half])
    output[mask] = expert(x[mask], *weights[half:])
    return output
