"""The operators: definition, PyTorch operator, ONNX node and function body are one."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.model.fused_moe import expert_linear, fused_moe
from plugins_trt import function
from plugins_trt.schema import DOMAIN, EXPERT_LINEAR, FLOAT_TYPES, FUSED_MOE, OPERATORS, VERSION, Operator
from runtime.bundle.manifest import OPERATOR_VERSIONS

SIZES = {"in": 12, "inter": 20, "2*inter": 40, "out": 28}
TORCH_OPERATORS = {FUSED_MOE.name: fused_moe, EXPERT_LINEAR.name: expert_linear}
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def model(operator: Operator, element: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """One node of the operator and its body; every input is a graph input."""
    values = {
        tensor.name: helper.make_tensor_value_info(
            tensor.name,
            TensorProto.BOOL if tensor.type == "bool" else element,
            [SIZES.get(dim, dim) for dim in tensor.shape],
        )
        for tensor in operator.inputs + operator.outputs
    }
    given = [values[tensor.name] for tensor in operator.inputs]
    node = helper.make_node(
        operator.name,
        [tensor.name for tensor in operator.inputs],
        ["output"],
        domain=DOMAIN,
        **operator.attributes,
    )
    return helper.make_model(
        helper.make_graph([node], "one", given, [values["output"]]),
        opset_imports=[helper.make_opsetid("", function.OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function.body(operator)],
        ir_version=11,
    )


def inputs(operator: Operator, mask: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    batch, sequence = mask.shape
    sizes = {**SIZES, "batch": batch, "sequence": sequence}
    return {
        tensor.name: mask
        if tensor.type == "bool"
        else generator.standard_normal([sizes[dim] for dim in tensor.shape]).astype(np.float32)
        for tensor in operator.inputs
    }


def in_float64(operator: Operator, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Each row by its definition, one by one, in float64."""
    values = {name: value.astype(np.float64) for name, value in feeds.items()}
    mask, rows = feeds["visual_mask"], values["hidden_states"]
    result = []
    for index in np.ndindex(mask.shape):
        expert, x = "visual" if mask[index] else "text", rows[index]
        if operator is FUSED_MOE:
            gate, up = np.split(values[f"{expert}_gate_up"] @ x, 2)
            result.append(values[f"{expert}_down"] @ (gate / (1 + np.exp(-gate)) * up))
        else:
            result.append(values[f"{expert}_weight"] @ x)
    width = SIZES["in"] if operator is FUSED_MOE else SIZES["out"]
    return np.array(result).reshape(*mask.shape, width)


def run_body(operator: Operator, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model(operator).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def run_torch(operator: Operator, feeds: dict[str, np.ndarray]) -> np.ndarray:
    call = TORCH_OPERATORS[operator.name]
    return call(*(torch.from_numpy(feeds[tensor.name]) for tensor in operator.inputs)).numpy()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_traced_operator_follows_the_definition(operator: Operator) -> None:
    """PyTorch's exporter makes exactly the node that the definition describes, its output's shape included."""

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return TORCH_OPERATORS[operator.name](*tensors)

    feeds = inputs(operator, np.array([[False, True, True]]))
    names = [tensor.name for tensor in operator.inputs]
    arguments = tuple(torch.from_numpy(feeds[name]) for name in names)
    traced = torch.onnx.export(
        Module(), arguments, dynamo=True, optimize=False, input_names=names, output_names=["output"]
    )
    assert traced is not None
    (node,) = traced.model.graph
    assert (node.op_type, node.domain) == (operator.name, DOMAIN)
    assert traced.model.opset_imports[DOMAIN] == VERSION
    assert [value.name for value in node.inputs] == names
    assert {name: attribute.value for name, attribute in node.attributes.items()} == operator.attributes
    (output,) = traced.model.graph.outputs
    assert tuple(output.shape) == in_float64(operator, feeds).shape


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_body_follows_the_definition(operator: Operator) -> None:
    body = function.body(operator)
    assert [tensor.name for tensor in operator.inputs] == list(body.input)
    assert [tensor.name for tensor in operator.outputs] == list(body.output)
    assert set(operator.attributes) == set(body.attribute)
    assert (operator.name, DOMAIN) == (body.name, body.domain)
    assert OPERATOR_VERSIONS[operator.name] == VERSION


@pytest.mark.parametrize("element", FLOAT_TYPES)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_body_passes_the_checker_for_every_type(operator: Operator, element: str) -> None:
    proto = model(operator, ONNX_TYPES[element])
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    output = inferred.graph.output[0].type.tensor_type
    assert output.elem_type == ONNX_TYPES[element]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    sequence=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_all_executions_agree(operator: Operator, data: st.DataObject, batch: int, sequence: int, seed: int) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=batch * sequence, max_size=batch * sequence))
    mask = np.array(bits, bool).reshape(batch, sequence)
    feeds = inputs(operator, mask, seed)
    expected = in_float64(operator, feeds)
    scale = max(1.0, np.abs(expected).max(initial=0))
    for run in (run_body, run_torch):
        got = run(operator, feeds)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_onnx_reference_evaluator_agrees(operator: Operator) -> None:
    mask = np.array([[False, True, True, False, True]])
    feeds = inputs(operator, mask)
    (got,) = ReferenceEvaluator(model(operator)).run(None, feeds)
    np.testing.assert_allclose(got, in_float64(operator, feeds), rtol=0, atol=1e-4)


@pytest.mark.parametrize("poisoned", ["text", "visual"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_row_never_touches_the_other_expert(operator: Operator, poisoned: str) -> None:
    """Weights of NaN and inf in one expert leave the other's rows as they are: routed, never blended."""
    mask = np.array([[True, False, False, True], [False, True, True, True]])
    clean = inputs(operator, mask)
    dirty = dict(clean)
    for name in clean:
        if name.startswith(f"{poisoned}_"):
            dirty[name] = np.where(np.arange(clean[name].shape[1]) % 2, np.nan, np.inf).astype(np.float32) + clean[name]
    dirty["visual_mask"] = mask
    others = mask if poisoned == "text" else ~mask
    for run in (run_body, run_torch):
        np.testing.assert_array_equal(run(operator, dirty)[others], run(operator, clean)[others])
        assert not np.isfinite(run(operator, dirty)[~others]).all(axis=-1).any()
