"""The definition of monoedge's operators: names, domain, version, inputs, outputs and attributes, as plain data.

Everything else follows this file: the PyTorch operators (``export.model.fused_moe``), the ONNX nodes, the function
bodies (``plugins_trt.function``) and the TensorRT plugin. It imports nothing, so every other module may import it.

Shapes are given in named dimensions; a name that appears twice is the same number. Weights are stored as PyTorch stores
a Linear, ``[out, in]``, in one layout for every chip.

``FusedMoE`` and ``ExpertLinear`` are written out. Their quantized forms follow from them by a rule (``quantized``) and
have names of their own, such as ``FusedMoETextW8A16``. ONNX has ``overload`` for several bodies of one name, but its
reference evaluator takes any of them (seen with onnx 1.23), and TensorRT does not tell a plugin which one is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DOMAIN = "monoedge"
VERSION = 1
"""Opset version of the domain. It rises whenever a node of the old version would compute something else."""

FLOAT_TYPES = ("float32", "bfloat16", "float16")
"""What the type variable T may be: the same for activations and weights of one node."""


@dataclass(frozen=True)
class Tensor:
    """One input or output: its name, element type and named dimensions.

    The type is ``"T"``, the node's one floating-point type, or ``"bool"``, ``"int8"``, ``"uint8"`` or ``"float32"``.
    """

    name: str
    type: str
    shape: tuple[str, ...]
    description: str


FLOAT = "float"
W8A16 = "w8a16"
W8A8 = "w8a8"
NBITS = "nbits"
"""Formats of an expert's matrices.

``float``: of type T. ``w8a16``: INT8 with one scale for each row. ``w8a8``: the same, and the activations that it is
multiplied with are INT8 with one scale. ``nbits``: blocks of unsigned integers of few bits, as ONNX Runtime's
``MatMulNBits`` takes them.
"""

EXPERTS = ("text", "visual")


@dataclass(frozen=True)
class Operator:
    """One operator of the domain, with its tensors in the order in which a node lists them.

    Attributes:
        family: the operator that this is a form of; its own name where nothing is quantized.
        text: format of the text expert's matrices.
        visual: format of the visual expert's.
    """

    name: str
    description: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    family: str
    text: str = FLOAT
    visual: str = FLOAT

    def format_of(self, expert: str) -> str:
        """Returns the format of the matrices of ``"text"`` or ``"visual"``."""
        return {"text": self.text, "visual": self.visual}[expert]

    @property
    def has_plugin(self) -> bool:
        """Whether TensorRT has a plugin for it; the ``nbits`` forms are for ONNX Runtime only."""
        return NBITS not in (self.text, self.visual)

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes that every node carries, with the same values in all.

        TensorRT's ONNX parser finds the plugin by them. Without ``plugin_namespace`` some versions take the function
        body of a node that has one too (seen with TensorRT for RTX 1.7.1).
        """
        return {"plugin_version": str(VERSION), "plugin_namespace": DOMAIN} if self.has_plugin else {}

    @property
    def size_attributes(self) -> tuple[str, ...]:
        """Integers that a node of an ``nbits`` form carries, since ``MatMulNBits`` wants sizes as attributes.

        Rows and columns of each matrix as ``gate_up_rows``, ``gate_up_columns``, then ``bits`` and ``block_size``.
        """
        sizes = (f"{name}_{size}" for name in MATRICES[self.family] for size in ("rows", "columns"))
        return () if self.has_plugin else (*sizes, "bits", "block_size")


_HIDDEN_STATES = Tensor("hidden_states", "T", ("batch", "sequence", "in"), "one row a token")
_VISUAL_MASK = Tensor(
    "visual_mask", "bool", ("batch", "sequence"), "true where the row belongs to the visual expert, else text"
)

FUSED_MOE = Operator(
    name="FusedMoE",
    family="FusedMoE",
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
    family="ExpertLinear",
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
"""The operators that a checkpoint is exported to. Nothing is quantized."""

MATRICES = {FUSED_MOE.name: ("gate_up", "down"), EXPERT_LINEAR.name: ("weight",)}
"""The matrices that each expert of a family has."""


def quantized(operator: Operator, text: str, visual: str = FLOAT) -> Operator:
    """Returns the form of ``FUSED_MOE`` or ``EXPERT_LINEAR`` with its experts' matrices in these formats.

    The family's inputs come first, in their order. For each matrix that is not ``float``, its scales ``…_scale``
    follow, and with ``w8a8`` the scale of the activations that it is multiplied with, ``…_input_scale``.

    Args:
        operator: the family.
        text: ``w8a16``, ``w8a8`` or ``nbits``.
        visual: the same, or ``float``.
    """
    inputs, scales = [], list[Tensor]()
    for tensor in operator.inputs:
        expert, _, matrix = tensor.name.partition("_")
        kind = {"text": text, "visual": visual}[expert] if matrix in MATRICES[operator.family] else FLOAT
        rows, columns = tensor.shape[-2:]
        if kind == FLOAT:
            inputs.append(tensor)
        elif kind == NBITS:
            blocks = f"blocks_of_{columns}"
            packed = f"{tensor.description}; each row in blocks, half the range stands for 0"
            inputs.append(Tensor(tensor.name, "uint8", (rows, blocks, "bytes_of_block"), packed))
            scales.append(Tensor(f"{tensor.name}_scale", "T", (rows, blocks), "one step of each block"))
        else:
            inputs.append(Tensor(tensor.name, "int8", tensor.shape, tensor.description))
            scales.append(Tensor(f"{tensor.name}_scale", "float32", (rows,), "one step of each row"))
        if kind == W8A8:
            scales.append(Tensor(f"{tensor.name}_input_scale", "float32", (), "one step of the activations"))
    name = operator.name + ("Text" if visual == FLOAT else "") + _NAMES[text]
    return replace(operator, name=name, inputs=(*inputs, *scales), text=text, visual=visual)


_NAMES = {W8A16: "W8A16", W8A8: "W8A8", NBITS: "NBits"}

QUANTIZED_OPERATORS = tuple(
    quantized(operator, kind, visual) for operator in OPERATORS for kind in (W8A16, W8A8) for visual in (FLOAT, kind)
)
"""The forms with INT8 matrices, in the text expert or in both."""

PLUGIN_OPERATORS = OPERATORS + QUANTIZED_OPERATORS
"""The operators that TensorRT has a plugin for."""

CPU_OPERATORS = tuple(quantized(operator, NBITS, visual) for operator in OPERATORS for visual in (FLOAT, NBITS))
"""The forms for ONNX Runtime on a CPU."""

ALL_OPERATORS = PLUGIN_OPERATORS + CPU_OPERATORS
