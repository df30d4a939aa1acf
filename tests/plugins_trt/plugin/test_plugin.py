"""The TensorRT plugin, with the parser and builder of TensorRT for RTX: all of it but what needs a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export.engines.plan import CAPACITY, Range, decoder_profiles, fix_dimension, graph_for, vision_profile
from plugins_trt import function
from plugins_trt.header import HEADER, header
from plugins_trt.schema import (
    DOMAIN,
    EXPERT_LINEAR,
    FUSED_MOE,
    OPERATORS,
    PLUGIN_OPERATORS,
    QUANTIZED_OPERATORS,
    VERSION,
    W8A8,
    W8A16,
    Operator,
    quantized,
)
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS
from runtime.doctor.plugin import SYMBOLS

Rtx = Callable[..., dict[str, Any]]

SIZES = {"in": 64, "inter": 96, "2*inter": 192, "out": 32}
TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
FIXED = {"bool": TensorProto.BOOL, "int8": TensorProto.INT8, "float32": TensorProto.FLOAT}
BYTES = {
    TensorProto.FLOAT: 4,
    TensorProto.BFLOAT16: 2,
    TensorProto.FLOAT16: 2,
    TensorProto.BOOL: 1,
    TensorProto.INT8: 1,
}
CAPABILITIES = ("SM86", "SM89", "SM120")
NODE = "layers.0.test"
PREFILL = {"batch": Range(1, 1, 2), "sequence": Range(1, 16, 40)}
DECODE = {"batch": Range.only(1), "sequence": Range.only(1)}


def node_model(
    operator: Operator,
    element: int = TensorProto.BFLOAT16,
    shapes: dict[str, list[int | str]] | None = None,
    types: dict[str, int] | None = None,
    inputs: list[str] | None = None,
    attributes: dict[str, str] | None = None,
    body: bool = True,
) -> onnx.ModelProto:
    """One node, its weights as initializers of zeros; the arguments after ``element`` replace what is right."""
    given, weights = [], []
    for tensor in operator.inputs:
        kind = (types or {}).get(tensor.name, FIXED.get(tensor.type, element))
        shape = (shapes or {}).get(tensor.name, [SIZES.get(dim, dim) for dim in tensor.shape])
        if all(isinstance(size, int) for size in shape):
            count = BYTES[kind]
            for size in shape:
                count *= int(size)
            weights.append(helper.make_tensor(tensor.name, kind, shape, bytes(count), raw=True))
        else:
            given.append(helper.make_tensor_value_info(tensor.name, kind, shape))
    node = helper.make_node(
        operator.name,
        inputs or [tensor.name for tensor in operator.inputs],
        ["output"],
        name=NODE,
        domain=DOMAIN,
        **(operator.attributes | (attributes or {})),
    )
    # Its shape and type are the plugin's to say.
    output = helper.make_tensor_value_info("output", element, None)
    return helper.make_model(
        helper.make_graph([node], "one", given, [output], weights),
        opset_imports=[helper.make_opsetid("", function.OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function.body(operator)] if body else [],
        ir_version=11,
    )


def errors(log: list[list[str]]) -> str:
    return "\n".join(line for severity, line in log if severity in ("ERROR", "INTERNAL_ERROR"))


# The definition ------------------------------------------------------------------------------------------------------


def test_header_says_what_the_schema_says() -> None:
    assert HEADER.read_text() == header(), "run: python -m plugins_trt.header"


def test_creators(rtx: Rtx) -> None:
    result = rtx()
    assert result["loaded"]
    assert sorted(result["creators"]) == sorted([op.name, str(VERSION), DOMAIN, []] for op in PLUGIN_OPERATORS)


def test_library_shows_what_is_asked_for_and_needs_no_tensorrt(library: Path) -> None:
    shown = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in shown.splitlines()} == set(SYMBOLS)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not any(name in needed for name in ("nvinfer", "tensorrt", "cudart"))


# What TensorRT asks of a plugin, asked by a program of ours -----------------------------------------------------------


@pytest.fixture(scope="session")
def host(plugin_build: Path) -> list[str]:
    run = subprocess.run([plugin_build / "plugin_host"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("operator", PLUGIN_OPERATORS, ids=lambda operator: operator.name)
def test_plugin_answers(host: list[str], operator: Operator) -> None:
    name, kinds = operator.name, [tensor.type for tensor in operator.inputs + operator.outputs]
    begin = next(i for i, line in enumerate(host) if line.startswith(f"{name} is:"))
    end = next(i for i, line in enumerate(host) if line.startswith(f"{name} refused:"))
    lines = host[begin : end + 1]
    sizes = "in 64, inter 96" if operator.family == FUSED_MOE.name else "in 64, out 32"

    def formats(kind: str) -> str:
        """Which tensors may be this where T is; where all are; and in another layout than the linear one."""
        halves = kind in ("bfloat16", "float16")
        as_t = ("y" if of != "T" or halves else "n" for of in kinds)
        everywhere = ("y" if of == kind or (of == "T" and halves) else "n" for of in kinds)
        return f"{name} formats {kind}: {''.join(as_t)} {''.join(everywhere)} {'n' * len(kinds)}"

    expected = [
        f"{name} is: {name} {VERSION} {DOMAIN}",
        f"{name} serializes: 0",
        *(formats(kind) for kind in ("bfloat16", "float16", "float32", "int8")),
        *(f"{name} configure {sequence}: 0" for sequence in (1, 40, 4096)),
        *(f"{name} workspace {sequence}: more" for sequence in (1, 40, 4096)),
        "log 1: [monoedge] a/node: output must be bfloat16 like the node's first input, got float16",
        f"{name} other output: -1",
        f"{name} shape change: 0",
        f"log 1: [monoedge] a/node: {name} could not be launched: cudaErrorInvalidValue (invalid argument) with "
        f"batch 2, sequence 5, {sizes}",
        f"{name} enqueue: -1",
        f"{name} enqueue no rows: 0",
        "log 1: [monoedge] a/node: visual_mask must be [batch, sequence] = [2, 0], got [2, 6]",
        f"{name} other mask: -1",
        f"log 1: [monoedge] b: {name} version 1 takes no fields, got top_k; use the plugin that the plan was built "
        "with",
        f"{name} refused: 1, unnamed: 1",
    ]
    assert [line for line in expected if line not in lines] == [], "\n".join(lines)
    workspaces = [line for line in lines if "workspace of" in line and sizes in line]
    assert [re.sub(r"of \d+ bytes", "of N bytes", line) for line in workspaces] == [
        f"log 4: [monoedge] a/node: workspace of N bytes for up to batch 2, sequence {sequence}, {sizes}"
        for sequence in (1, 40, 4096)
    ]


# One node, parsed and built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "precision", "capability"),
    [
        *(
            pytest.param(operator, precision, capability, id=f"{operator.name}-{precision}-{capability}")
            for operator in OPERATORS
            for precision in ("bf16", "fp16")
            for capability in CAPABILITIES
        ),
        *(pytest.param(operator, "bf16", "SM89", id=operator.name) for operator in QUANTIZED_OPERATORS),
    ],
)
def test_one_node(rtx: Rtx, operator: Operator, precision: str, capability: str) -> None:
    result = rtx(node_model(operator, TYPES[precision]), capability=capability, profiles=(PREFILL, DECODE))
    assert result["parsed"], result["errors"]
    assert [NODE, "PLUGIN_V3"] in result["layers"]
    width = SIZES[operator.outputs[0].shape[-1]]
    assert result["outputs"] == {"output": ["BF16" if precision == "bf16" else "HALF", [-1, -1, width]]}
    assert result["plan"], result["log"]
    assert errors(result["log"]) + result["stderr"] == ""


def test_sizes_that_fit_no_vector(rtx: Rtx) -> None:
    model = node_model(EXPERT_LINEAR, shapes={"text_weight": [3, 64], "visual_weight": [3, 64]})
    assert rtx(model, capability="SM89", profiles=(PREFILL,))["plan"]


def test_weights_may_be_inputs(rtx: Rtx) -> None:
    model = node_model(EXPERT_LINEAR, shapes={"text_weight": ["out", 64]})
    result = rtx(model, capability="SM89", profiles=({**PREFILL, "out": Range.only(32)},))
    assert result["plan"], result
    assert result["outputs"]["output"][1] == [-1, -1, 32]


@dataclass(frozen=True)
class Refused:
    """A model that differs from a right one in one thing, and what is said about it, by the plugin or by TensorRT."""

    operator: Operator
    message: str
    change: dict[str, Any] = field(default_factory=dict)


def ours(message: str) -> str:
    return f"[monoedge] {NODE}: {message}"


REFUSED = {
    "rank of the rows": Refused(
        FUSED_MOE,
        ours("hidden_states must have 3 dimensions, [batch, sequence, in], got [?, 64]"),
        {"shapes": {"hidden_states": ["sequence", 64]}},
    ),
    "rank of the mask": Refused(
        EXPERT_LINEAR,
        ours("visual_mask must have 2 dimensions, [batch, sequence], got [?, ?, 1]"),
        {"shapes": {"visual_mask": ["batch", "sequence", 1]}},
    ),
    "rank of a weight": Refused(
        EXPERT_LINEAR,
        ours("visual_weight must have 2 dimensions, [out, in], got [32, 64, 1]"),
        {"shapes": {"visual_weight": [32, 64, 1]}},
    ),
    "odd gate and up": Refused(
        FUSED_MOE,
        ours("text_gate_up must be [2*inter, in] = [2*inter, 64], got [193, 64]"),
        {"shapes": {"text_gate_up": [193, 64]}},
    ),
    "down of another width": Refused(
        FUSED_MOE,
        ours("text_down must be [in, inter] = [64, 96], got [64, 97]"),
        {"shapes": {"text_down": [64, 97]}},
    ),
    "down transposed": Refused(
        FUSED_MOE,
        ours("visual_down must be [in, inter] = [64, 96], got [96, 64]"),
        {"shapes": {"visual_down": [96, 64]}},
    ),
    "experts of two widths": Refused(
        FUSED_MOE,
        ours("visual_gate_up must be [2*inter, in] = [192, 64], got [190, 64]"),
        {"shapes": {"visual_gate_up": [190, 64]}},
    ),
    "a weight for other rows": Refused(
        EXPERT_LINEAR,
        ours("text_weight must be [out, in] = [out, 64], got [32, 65]"),
        {"shapes": {"text_weight": [32, 65]}},
    ),
    "experts of two outputs": Refused(
        EXPERT_LINEAR,
        ours("visual_weight must be [out, in] = [32, 64], got [33, 64]"),
        {"shapes": {"visual_weight": [33, 64]}},
    ),
    "a mask for another batch": Refused(
        FUSED_MOE,
        ours("visual_mask must be [batch, sequence] = [2, sequence], got [3, ?]"),
        {"shapes": {"hidden_states": [2, "sequence", 64], "visual_mask": [3, "sequence"]}},
    ),
    "float32": Refused(
        EXPERT_LINEAR,
        ours("hidden_states must be bfloat16 or float16, got float32; export the model with --dtype bf16"),
        {"element": TensorProto.FLOAT},
    ),
    "a weight of another type": Refused(
        FUSED_MOE,
        ours("text_down must be bfloat16 like the node's first input, got float16"),
        {"types": {"text_down": TensorProto.FLOAT16}},
    ),
    "a mask of another type": Refused(
        EXPERT_LINEAR,
        ours("visual_mask must be bool, got float32"),
        {"types": {"visual_mask": TensorProto.FLOAT}},
    ),
    "an input too few": Refused(
        FUSED_MOE,
        ours(
            "FusedMoE version 1 must have 6 inputs (hidden_states, visual_mask, text_gate_up, text_down, "
            "visual_gate_up, visual_down) and 1 output, got 5 and 1; export the model with the monoedge that this "
            "plugin comes with"
        ),
        {"inputs": [tensor.name for tensor in FUSED_MOE.inputs[:-1]]},
    ),
    "an input too many": Refused(
        EXPERT_LINEAR,
        ours(
            "ExpertLinear version 1 must have 4 inputs (hidden_states, visual_mask, text_weight, visual_weight) and "
            "1 output, got 5 and 1; export the model with the monoedge that this plugin comes with"
        ),
        {"inputs": [*(tensor.name for tensor in EXPERT_LINEAR.inputs), "visual_weight"]},
    ),
    "an input left out": Refused(
        FUSED_MOE,
        # What TensorRT for RTX puts in the place of an input without a name.
        ours("text_down must be bfloat16 like the node's first input, got float32"),
        {"inputs": [tensor.name.replace("text_down", "") for tensor in FUSED_MOE.inputs]},
    ),
    "INT8 in the operator without": Refused(
        FUSED_MOE,
        ours("text_down must be bfloat16 like the node's first input, got int8"),
        {"types": {"text_down": TensorProto.INT8}},
    ),
    "an INT8 weight that is none": Refused(
        quantized(FUSED_MOE, W8A16),
        ours("text_down must be int8, got bfloat16"),
        {"types": {"text_down": TensorProto.BFLOAT16}},
    ),
    "both experts in INT8, the operator for one": Refused(
        quantized(EXPERT_LINEAR, W8A8),
        ours("visual_weight must be bfloat16 like the node's first input, got int8"),
        {"types": {"visual_weight": TensorProto.INT8}},
    ),
    "scales in bfloat16": Refused(
        quantized(EXPERT_LINEAR, W8A16),
        ours("text_weight_scale must be float32, got bfloat16"),
        {"types": {"text_weight_scale": TensorProto.BFLOAT16}},
    ),
    "scales of gate alone": Refused(
        quantized(FUSED_MOE, W8A16, W8A16),
        ours("visual_gate_up_scale must be [2*inter] = [192], got [96]"),
        {"shapes": {"visual_gate_up_scale": [96]}},
    ),
    "a scale of the activations for each column": Refused(
        quantized(FUSED_MOE, W8A8),
        ours("text_down_input_scale must have 0 dimensions, [], got [96]"),
        {"shapes": {"text_down_input_scale": [96]}},
    ),
    "scales left out": Refused(
        quantized(EXPERT_LINEAR, W8A16),
        ours(
            "ExpertLinearTextW8A16 version 1 must have 5 inputs (hidden_states, visual_mask, text_weight, "
            "visual_weight, text_weight_scale) and 1 output, got 4 and 1; export the model with the monoedge that this "
            "plugin comes with"
        ),
        {"inputs": [tensor.name for tensor in EXPERT_LINEAR.inputs]},
    ),
    "another version": Refused(
        FUSED_MOE,
        "Plugin not found, are the plugin name, version, and namespace correct?",
        {"attributes": {"plugin_version": "2"}, "body": False},
    ),
    "another version, with a body": Refused(
        # The parser takes the body then, and knows no NonZero.
        FUSED_MOE,
        "NonZero plugin creator version 1 was not found in plugin registry",
        {"attributes": {"plugin_version": "2"}},
    ),
    "another namespace, with a body": Refused(
        EXPERT_LINEAR,
        "NonZero plugin creator version 1 was not found in plugin registry",
        {"attributes": {"plugin_namespace": "other"}},
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(rtx: Rtx, case: Refused) -> None:
    result = rtx(node_model(case.operator, **case.change), capability="SM89", profiles=(PREFILL,))
    assert not result["parsed"]
    # The plugin's words come through TensorRT's logger or, built with headers of TensorRT 10 and loaded by TensorRT
    # for RTX, on standard error.
    said = (errors(result["log"]) + "\n" + result["stderr"]).splitlines()
    assert any(case.message == line or (case.message in line and "monoedge" not in case.message) for line in said), said


def test_profile_that_contradicts_itself(rtx: Rtx) -> None:
    # Nothing is wrong with the network: that rows and mask differ is known when the profile is.
    model = node_model(EXPERT_LINEAR, shapes={"visual_mask": ["batch", "other"]})
    profile = {**PREFILL, "other": Range(1, 8, 20)}
    result = rtx(model, capability="SM89", profiles=(profile,))
    assert result["parsed"]
    assert result["plan"] is None
    assert ours("visual_mask must be [batch, sequence] = [2, 40], got [2, 20]") in (
        errors(result["log"]) + result["stderr"]
    )


# Whole graphs ---------------------------------------------------------------------------------------------------------


def builds(rtx: Rtx, graph: Path, capability: str, target: str = "trt-rtx") -> list[str]:
    """Builds a decoder, all of whose custom nodes become plugins; the operators that they are of."""
    model = graph_for(TARGETS[target], Bundle(graph.parent), graph.name)
    custom = {node.name: node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert custom
    fix_dimension(model, CAPACITY, 512)
    result = rtx(model, graph, capability, decoder_profiles(capacity=512, chunk=128))
    assert result["parsed"], result["errors"]
    assert {name for name, kind in result["layers"] if kind.startswith("PLUGIN")} == set(custom)
    assert {kind for name, kind in result["layers"] if name in custom} == {"PLUGIN_V3"}
    assert result["profiles"] == 2
    assert result["plan"], result["log"]
    assert errors(result["log"]) + result["stderr"] == ""
    return sorted(set(custom.values()))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decoder(rtx: Rtx, bf16_bundle: Path, capability: str) -> None:
    builds(rtx, bf16_bundle / "decoder.onnx", capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decoder_of_the_example(rtx: Rtx, shapes_bf16_bundle: Path, capability: str) -> None:
    """Trained weights, other sizes; what ``builds`` counts is one node a layer."""
    facts = Bundle(shapes_bf16_bundle).manifest
    assert builds(rtx, shapes_bf16_bundle / "decoder.onnx", capability) == sorted(facts.operators)
    graph = onnx.load(shapes_bf16_bundle / "decoder.onnx", load_external_data=False).graph
    assert sum(node.domain == DOMAIN for node in graph.node) == facts.model.num_hidden_layers


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_int8_decoder(rtx: Rtx, bf16_bundle: Path, quantize: Callable[..., Path], mode: str, capability: str) -> None:
    operators = builds(rtx, quantize(bf16_bundle, mode) / "decoder.onnx", capability)
    assert f"FusedMoEText{mode.upper()}" in operators


@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_decoder_with_everything_in_int8(rtx: Rtx, bf16_bundle: Path, quantize: Callable[..., Path], mode: str) -> None:
    operators = builds(rtx, quantize(bf16_bundle, mode, everything=True) / "decoder.onnx", "SM89")
    assert f"FusedMoE{mode.upper()}" in operators


def test_portable_decoder(rtx: Rtx, bf16_bundle: Path) -> None:
    """As TensorRT 10.3 is given it."""
    builds(rtx, bf16_bundle / "decoder.onnx", "SM86", "trt10.3")


@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_portable_int8_decoder(rtx: Rtx, bf16_bundle: Path, quantize: Callable[..., Path], mode: str) -> None:
    builds(rtx, quantize(bf16_bundle, mode) / "decoder.onnx", "SM86", "trt10.3")


def test_portable_vision(rtx: Rtx, bf16_bundle: Path) -> None:
    graph = bf16_bundle / "vision.onnx"
    model = graph_for(TARGETS["trt10.3"], Bundle(bf16_bundle), graph.name)
    result = rtx(model, graph, "SM86", (vision_profile(13),))
    assert result["parsed"], result["errors"]
    assert result["plan"], result["log"]


def test_capacity_must_be_fixed(rtx: Rtx, bf16_bundle: Path) -> None:
    graph = bf16_bundle / "decoder.onnx"
    model = onnx.load(graph, load_external_data=False)
    prefill, decode = ({**profile, CAPACITY: Range.only(512)} for profile in decoder_profiles(512, 128))
    result = rtx(model, graph, "SM89", (prefill, decode))
    assert result["plan"] is None
    assert "must have a static sequence length dimension" in errors(result["log"])
