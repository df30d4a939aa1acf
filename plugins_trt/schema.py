"""The definition of monoedge's operators: names, domain, version, inputs, outputs and attributes, as plain data.

Everything else follows this file: the PyTorch operators (``export.fused_moe``), the ONNX nodes, the function
bodies (``plugins_trt.function``) and the TensorRT plugin. It imports nothing, so that anybody may import it.

Shapes are given in named dimensions; a name that appears twice is the same number. Weights lie as PyTorch stores
a Linear, ``[out, in]``, one layout for every chip.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "monoedge"
VERSION = 1
"""Opset version of the domain. Raised whenever a node of the old version would compute something else."""

FLOAT_TYPES = ("float32", "bfloat16", "float16")
"""What the type variable T may be: the same for activations and weights of one node."""


@dataclass(frozen=True)
class Tensor:
    """One input or output: its name, element type (``"T"`` or ``"bool"``) and named dimensions."""

    name: str
    type: str
    shape: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Operator:
    """One operator of the domain, its tensors in the order in which a node lists them."""

    name: str
    description: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes that every node carries.

        TensorRT's ONNX parser finds the plugin by them: where a node has a function body too, some versions take
        the body unless ``plugin_namespace`` is there (seen with TensorRT for RTX 1.7.1).
        """
        return {"plugin_version": str(VERSION), "plugin_namespace": DOMAIN}


_HIDDEN_STATES = Tensor("hidden_states", "T", ("batch", "sequence", "in"), "one row a token")
_VISUAL_MASK = Tensor(
    "visual_mask", "bool", ("batch", "sequence"), "true where the row belongs to the visual expert, else text"
)

FUSED_MOE = Operator(
    name="FusedMoE",
    description=(
        "Gated feed-forward network with one text and one visual expert. Row r of the output is "
        "down_e @ (silu(gate_e @ x_r) * (up_e @ x_r)), with e chosen by visual_mask[r] alone: "
        "a row never touches the other expert."
    ),
    inputs=(
        _HIDDEN_STATES,
        _VISUAL_MASK,
        Tensor("text_gate_up", "T", ("2*inter", "in"), "gate rows, then up rows (w1, w3 of the checkpoint)"),
        Tensor("text_down", "T", ("in", "inter"), "w2 of the checkpoint"),
        Tensor("visual_gate_up", "T", ("2*inter", "in"), "the same for the visual expert"),
        Tensor("visual_down", "T", ("in", "inter"), "the same for the visual expert"),
    ),
    outputs=(Tensor("output", "T", ("batch", "sequence", "in"), "like hidden_states"),),
)

EXPERT_LINEAR = Operator(
    name="ExpertLinear",
    description=(
        "Linear layer with one text and one visual weight. Row r of the output is weight_e @ x_r, with e chosen by "
        "visual_mask[r] alone. Version 1.5 of the model uses it around its attention."
    ),
    inputs=(
        _HIDDEN_STATES,
        _VISUAL_MASK,
        Tensor("text_weight", "T", ("out", "in"), "weight of the text expert"),
        Tensor("visual_weight", "T", ("out", "in"), "weight of the visual expert"),
    ),
    outputs=(Tensor("output", "T", ("batch", "sequence", "out"), "one row a token"),),
)

OPERATORS = (FUSED_MOE, EXPERT_LINEAR)
