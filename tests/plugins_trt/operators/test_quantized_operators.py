"""The INT8 forms of the operators: their bodies against float64, and against each other."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from plugins_trt import function
from plugins_trt.schema import (
    ALL_OPERATORS,
    CPU_OPERATORS,
    EXPERTS,
    FLOAT,
    FUSED_MOE,
    MATRICES,
    NBITS,
    QUANTIZED_OPERATORS,
    VERSION,
    W8A8,
    Operator,
)
from runtime.bundle.manifest import OPERATOR_VERSIONS

from ..problems import FACTORS, NUMPY_TYPES, Data, check, make, reference
from .bodies import arrays_of, block_size_of, body_model, problem_of, run_body, run_model

FORMS = pytest.mark.parametrize("form", QUANTIZED_OPERATORS + CPU_OPERATORS, ids=lambda form: form.name)
INT8_FORMS = pytest.mark.parametrize("form", QUANTIZED_OPERATORS, ids=lambda form: form.name)
CPU_FORMS = pytest.mark.parametrize("form", CPU_OPERATORS, ids=lambda form: form.name)


def test_the_runtime_knows_all_operators() -> None:
    assert {operator.name: VERSION for operator in ALL_OPERATORS} == OPERATOR_VERSIONS


@FORMS
def test_body_follows_the_definition(form: Operator) -> None:
    body = function.body(form)
    assert body.name == form.name
    assert list(body.input) == [tensor.name for tensor in form.inputs]
    assert list(body.output) == [tensor.name for tensor in form.outputs]
    assert list(body.attribute) == [*form.attributes, *form.size_attributes]


@pytest.mark.parametrize("opset", [20, 24])
@pytest.mark.parametrize("element", NUMPY_TYPES)
@INT8_FORMS
def test_body_passes_the_checker_for_every_type(form: Operator, element: str, opset: int) -> None:
    data = make(problem_of(form, 5, 16, 24, type=element))
    model = body_model(data, form, arrays_of(data, form, element))
    model.opset_import[0].version = opset
    model.functions[0].CopyFrom(function.body(form, opset))
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    output = inferred.graph.output[0].type.tensor_type
    assert output.elem_type == model.graph.input[0].type.tensor_type.elem_type


@pytest.mark.parametrize("element", NUMPY_TYPES)
@pytest.mark.parametrize("mask", FACTORS["mask"])
@INT8_FORMS
def test_body_is_what_float64_says(form: Operator, mask: str, element: str) -> None:
    """In every number format: what a body rounds is what the kernels may round, and no more."""
    data = make(problem_of(form, 7, 96, 40, mask, element))
    check(data, run_body(data), *reference(data))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(QUANTIZED_OPERATORS),
    rows=st.integers(0, 9),
    hidden=st.integers(1, 40),
    size=st.integers(1, 40),
    mask=st.sampled_from(FACTORS["mask"]),
    seed=st.integers(0, 99),
)
def test_body_at_any_size(form: Operator, rows: int, hidden: int, size: int, mask: str, seed: int) -> None:
    data = make(problem_of(form, rows, hidden, size, mask, "float32", seed=seed))
    check(data, run_body(data), *reference(data))


def test_a_product_is_quantized_before_it_is_rounded() -> None:
    """In w8a8 the product of gate and up goes from float32 to INT8. After a stop in bfloat16 every fourth or so would
    be another number, and with them most results."""
    form = next(form for form in QUANTIZED_OPERATORS if form.name == "FusedMoETextW8A8")
    data = make(problem_of(form, 40, 64, 64, "none", "bfloat16"))
    wide = run_body(data, element="float32").astype(NUMPY_TYPES["bfloat16"])
    assert np.mean(run_body(data) != wide) < 0.02


@pytest.mark.parametrize("poisoned", EXPERTS)
@FORMS
def test_a_row_never_touches_the_other_expert(form: Operator, poisoned: str) -> None:
    """NaN in one expert's rows and scales, or weights, leaves the other's rows as they are, bit for bit."""
    data = make(problem_of(form, 12, 64, 48, "alternating", "float32"))
    clean = arrays_of(data, form, "float32")
    theirs = data.mask if poisoned == "visual" else ~data.mask
    dirty = {**clean, "hidden_states": np.where(theirs[None, :, None], np.nan, clean["hidden_states"])}
    for name, array in clean.items():
        if name.startswith(f"{poisoned}_") and array.dtype == np.float32:
            dirty[name] = np.full_like(array, np.nan)
    before = run_model(body_model(data, form, clean), clean)
    after = run_model(body_model(data, form, dirty), dirty)
    np.testing.assert_array_equal(after[~theirs], before[~theirs])
    assert not np.isfinite(after[theirs]).any()


# On a CPU -------------------------------------------------------------------------------------------------------------


def exact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with activations as they are, in float32: the slow way of MatMulNBits."""
    levels = [
        attribute
        for node in model.functions[0].node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert levels
    for level in levels:
        level.i = 0
    return model


@pytest.mark.parametrize("sizes", [(128, 256), (64, 40), (130, 200)], ids=str)
@pytest.mark.parametrize("mask", FACTORS["mask"])
@CPU_FORMS
def test_cpu_form_has_the_same_weights(form: Operator, mask: str, sizes: tuple[int, int]) -> None:
    """With exact activations it is the QuantizeLinear form, to float32; an expert may have no rows."""
    data = make(problem_of(form, 6, *sizes, mask, "float32"))
    arrays = arrays_of(data, form, "float32")
    check(data, run_model(exact(body_model(data, form, arrays)), arrays), *reference(data))


def block_steps(rows: np.ndarray, size: int) -> np.ndarray:
    """Half a step of INT8 for each element, where each block of a row has its own scale."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))
    largest = np.abs(padded.reshape(len(rows), -1, size)).max(axis=2)
    return np.repeat(largest / 127 / 2, size, axis=1)[:, : rows.shape[1]]


def reference_by_blocks(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Output in float64, and how far activations in INT8, block by block, can move each element at most."""
    expected, allowed = reference(data)
    size = block_size_of(data)
    for expert, chosen in (("text", ~data.mask), ("visual", data.mask)):
        matrices = [data.matrices[f"{expert}_{name}"] for name in MATRICES[data.problem.operator.name]]
        if not chosen.any() or matrices[0].scale is None:
            continue
        rows = data.hidden_states[chosen].astype(np.float64)
        off = block_steps(rows, size)
        if data.problem.operator is FUSED_MOE:
            values = matrices[0].values.T
            gate, up = np.split(rows @ values, 2, axis=1)
            gate_off, up_off = np.split(off @ np.abs(values), 2, axis=1)
            silu = gate / (1 + np.exp(-gate))
            rows = silu * up
            # |silu'| < 1.1
            off = 1.1 * gate_off * (np.abs(up) + up_off) + np.abs(silu) * up_off
            off += block_steps(np.abs(rows) + off, size)
        allowed[chosen] += 1.01 * off @ np.abs(matrices[-1].values).T
    return expected, allowed


@pytest.mark.parametrize("sizes", [(128, 256), (64, 40), (130, 200)], ids=str)
@pytest.mark.parametrize(("rows", "mask"), [(1, "none"), (6, "span"), (60, "spans")])
@CPU_FORMS
def test_cpu_form_rounds_activations_alone(form: Operator, rows: int, mask: str, sizes: tuple[int, int]) -> None:
    data = make(problem_of(form, rows, *sizes, mask, "float32"))
    got = run_body(data, form)
    check(data, got, *reference_by_blocks(data))
    # It is INT8 that is fast: with float32 activations it would be much closer.
    assert not np.allclose(got[~data.mask], reference(data)[0][~data.mask], rtol=0, atol=1e-4)


def test_cpu_form_takes_no_rows() -> None:
    for form in CPU_OPERATORS:
        data = make(problem_of(form, 0, 128, 256, "none", "float32"))
        assert run_body(data, form).shape == (0, data.problem.out)


def test_forms_are_named_apart() -> None:
    assert len({form.name for form in ALL_OPERATORS}) == len(ALL_OPERATORS)
    for form in QUANTIZED_OPERATORS:
        kinds = {form.format_of(expert) for expert in EXPERTS} - {FLOAT}
        assert len(kinds) == 1
        assert any(tensor.name.endswith("_input_scale") for tensor in form.inputs) == (kinds == {W8A8})
    assert all(NBITS in (form.text, form.visual) for form in CPU_OPERATORS)
