"""The operator family for PyTorch: shape inference, eager computation, and the translation to ONNX nodes.

Signatures and attributes follow ``plugins_trt.schema``; only the arithmetic stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnxscript import values

from plugins_trt.schema import (
    DOMAIN,
    EXPERT_LINEAR,
    FLOAT_TYPES,
    FUSED_MOE,
    OPERATORS,
    VERSION,
    Operator,
    Tensor,
)


def _python_name(operator: Operator) -> str:
    """``FusedMoE`` → ``fused_moe``: PyTorch's naming of operators."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", operator.name).lower()


def _define(operator: Operator) -> Any:  # noqa: ANN401 - torch has no public type for an operator overload
    name = _python_name(operator)
    parameters = ", ".join(f"Tensor {tensor.name}" for tensor in operator.inputs)
    torch.library.define(f"{DOMAIN}::{name}", f"({parameters}) -> Tensor")
    return getattr(getattr(torch.ops, DOMAIN), name).default


_OVERLOADS = {operator.name: _define(operator) for operator in OPERATORS}


def _route(
    hidden_states: torch.Tensor,
    visual_mask: torch.Tensor,
    text: Callable[[torch.Tensor], torch.Tensor],
    visual: Callable[[torch.Tensor], torch.Tensor],
    out_features: int,
) -> torch.Tensor:
    """Each expert on its own rows only. Never a blend: inf · 0 of the expert not wanted would be NaN."""
    output = hidden_states.new_empty(*hidden_states.shape[:-1], out_features)
    output[~visual_mask] = text(hidden_states[~visual_mask])
    output[visual_mask] = visual(hidden_states[visual_mask])
    return output


def _swiglu(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _fused_moe_eager(
    hidden_states: torch.Tensor,
    visual_mask: torch.Tensor,
    text_gate_up: torch.Tensor,
    text_down: torch.Tensor,
    visual_gate_up: torch.Tensor,
    visual_down: torch.Tensor,
) -> torch.Tensor:
    return _route(
        hidden_states,
        visual_mask,
        lambda rows: _swiglu(rows, text_gate_up, text_down),
        lambda rows: _swiglu(rows, visual_gate_up, visual_down),
        text_down.shape[0],
    )


def _expert_linear_eager(
    hidden_states: torch.Tensor,
    visual_mask: torch.Tensor,
    text_weight: torch.Tensor,
    visual_weight: torch.Tensor,
) -> torch.Tensor:
    return _route(
        hidden_states,
        visual_mask,
        lambda rows: F.linear(rows, text_weight),
        lambda rows: F.linear(rows, visual_weight),
        text_weight.shape[0],
    )


def _callable(operator: Operator, eager: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The operator as modules call it: one node while exporting, otherwise plain PyTorch, which has gradients."""
    torch.library.impl(f"{DOMAIN}::{_python_name(operator)}", "CompositeExplicitAutograd", eager)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (_OVERLOADS[operator.name] if torch.compiler.is_exporting() else eager)(*inputs)
        return result

    return call


fused_moe = _callable(FUSED_MOE, _fused_moe_eager)
expert_linear = _callable(EXPERT_LINEAR, _expert_linear_eager)


@torch.library.register_fake(f"{DOMAIN}::{_python_name(FUSED_MOE)}")  # type: ignore[untyped-decorator]
def _fused_moe_fake(hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden_states)


@torch.library.register_fake(f"{DOMAIN}::{_python_name(EXPERT_LINEAR)}")  # type: ignore[untyped-decorator]
def _expert_linear_fake(
    hidden_states: torch.Tensor, visual_mask: torch.Tensor, text_weight: torch.Tensor, *_: torch.Tensor
) -> torch.Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], text_weight.shape[0])


def op_schema(operator: Operator) -> onnx.defs.OpSchema:
    """The operator as ONNX describes one. Not registered: a bundle's graphs carry function bodies instead."""
    types = [f"tensor({name.replace('32', '')})" for name in FLOAT_TYPES]
    return onnx.defs.OpSchema(
        operator.name,
        DOMAIN,
        VERSION,
        doc=operator.description,
        inputs=[_parameter(tensor) for tensor in operator.inputs],
        outputs=[_parameter(tensor) for tensor in operator.outputs],
        type_constraints=[("T", types, "activations and weights")],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.STRING, "how TensorRT finds the plugin")
            for name in operator.attributes
        ],
    )


def _parameter(tensor: Tensor) -> onnx.defs.OpSchema.FormalParameter:
    type_str = "T" if tensor.type == "T" else f"tensor({tensor.type})"
    return onnx.defs.OpSchema.FormalParameter(tensor.name, type_str, tensor.description)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """``custom_translation_table`` for ``torch.onnx.export``: each operator becomes one ONNX node."""
    opset = values.Opset(DOMAIN, VERSION)

    def translation(operator: Operator) -> Callable[..., Any]:
        node = values.Op(opset, operator.name, op_schema(operator))

        def translate(*inputs: Any) -> Any:  # noqa: ANN401 - symbolic values of onnxscript
            return node(*inputs, **operator.attributes)

        return translate

    return {_OVERLOADS[operator.name]: translation(operator) for operator in OPERATORS}
