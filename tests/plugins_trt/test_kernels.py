"""The kernels, compiled for a CPU, against float64 and against the operators' bodies."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper

from plugins_trt import function
from plugins_trt.schema import EXPERT_LINEAR, OPERATORS, PLUGIN_OPERATORS, Operator

from .kernels import SUCCESS, Kernels, build_for_cpu, passes
from .operators.bodies import problem_of, run_body
from .problems import FACTORS, KERNEL_TYPES, NUMPY_TYPES, Problem, check, covering, make, mask_of, reference


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels for a CPU: threads are fibers."""
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    kernels.emulate()
    return kernels


@pytest.mark.parametrize("problem", covering(), ids=str)
def test_agrees_with_float64(kernels: Kernels, problem: Problem) -> None:
    passes(kernels, make(problem))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operator=st.sampled_from(OPERATORS),
    rows=st.integers(1, 70),
    hidden=st.integers(1, 80) | st.integers(1, 6).map(lambda n: 16 * n),
    size=st.integers(1, 80) | st.integers(1, 10).map(lambda n: 16 * n),
    mask=st.sampled_from(FACTORS["mask"]),
    kind=st.sampled_from(FACTORS["type"]),
    formats=st.tuples(st.sampled_from(FACTORS["text"]), st.sampled_from(FACTORS["visual"])),
    seed=st.integers(0, 99),
)
def test_any_small_size(
    kernels: Kernels,
    operator: object,
    rows: int,
    hidden: int,
    size: int,
    mask: str,
    kind: str,
    formats: tuple[str, str],
    seed: int,
) -> None:
    passes(kernels, make(Problem(operator, rows, hidden, size, mask, kind, *formats, seed)))


@pytest.mark.parametrize("rows", [7, 16, 150])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_order_of_threads_does_not_matter(kernels: Kernels, operator: object, rows: int) -> None:
    """A barrier that is missing would let a warp read what another has not written yet, or has written again.

    One block walks over all tiles; stages of a tile end where those of the next begin.
    """
    for sizes in ((208, 96), (96, 65)):
        data = make(Problem(operator, rows, *sizes, "alternating", text="w8a16"))
        outputs = []
        for backwards in (False, True):
            kernels.emulate(processors=1, backwards=backwards)
            outputs.append(passes(kernels, data).view(np.uint16))
        np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("backwards", [False, True])
def test_more_rows_than_are_routed_at_once(kernels: Kernels, backwards: bool, size: int) -> None:
    kernels.emulate(backwards=backwards)
    passes(kernels, make(Problem(EXPERT_LINEAR, 2500, 16, size, "spans")))


@pytest.mark.parametrize("text", ["float", "w8a16", "w8a8"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_number_of_blocks_does_not_matter(kernels: Kernels, operator: object, text: str) -> None:
    """One block that walks over all large tiles; a block for each small one, some of which find nothing to do."""
    for size in (80, 65):
        data = make(Problem(operator, 150, 208, size, "spans", text=text))
        outputs = []
        for processors in (1, 1000):
            kernels.emulate(processors)
            outputs.append(passes(kernels, data).view(np.uint16))
        np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("form", PLUGIN_OPERATORS, ids=lambda form: form.name)
@pytest.mark.parametrize("kind", KERNEL_TYPES)
@pytest.mark.parametrize("rows", [5, 40])
def test_agrees_with_the_body(kernels: Kernels, rows: int, kind: str, form: Operator) -> None:
    """The body runs in float32 on the same numbers; INT8 matrices are INT8 there too."""
    data = make(problem_of(form, rows, 112, 176, "spans", kind))
    status, output = kernels.run(data)
    assert status == SUCCESS
    check(data, output, run_body(data, element="float32").astype(np.float64), reference(data)[1])


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("kind", KERNEL_TYPES)
def test_rows_are_quantized_as_quantize_linear_says(kernels: Kernels, kind: str, rows: int) -> None:
    """The identity matrix shows the rows in int8: ties to even, [-128, 127], and NaN as 0."""
    width, scale = 64, np.float32(0.25)
    data = make(Problem(EXPERT_LINEAR, rows, width, width, "none", kind, "w8a8"))
    values = np.linspace(-40, 40, rows * width, dtype=np.float32).reshape(rows, width)
    values[0, :8] = [0.125, 0.375, -0.125, -0.375, 31.625, 31.875, np.inf, -np.inf]
    values[1, 0] = np.nan
    data.hidden_states = values.astype(NUMPY_TYPES[kind])
    matrix = data.matrices["text_weight"]
    matrix.data = np.eye(width, dtype=np.int8)
    matrix.scale, matrix.input_scale = np.ones(width, np.float32), np.array([scale])
    status, output = kernels.run(data)
    assert status == SUCCESS
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [value("x", TensorProto.FLOAT, values.shape)],
        [value("y", TensorProto.INT8, values.shape)],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", TensorProto.INT8, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", function.OPSET)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(
        None, {"x": np.nan_to_num(data.hidden_states.astype(np.float32), posinf=1e9, neginf=-1e9)}
    )
    np.testing.assert_array_equal(output.astype(np.float32) / scale, expected)
    assert {-128, 127} <= set(expected.ravel())


def test_sums_of_int8_are_exact_to_the_last_size(kernels: Kernels) -> None:
    """The largest sum there can be: -128 · -128, 131071 times."""
    width = (1 << 17) - 16
    problem = Problem(EXPERT_LINEAR, 1, width, 8, "none", "bfloat16", "w8a8")
    data = make(problem)
    data.hidden_states = np.full((1, width), -1e6, NUMPY_TYPES["bfloat16"])
    data.matrices["text_weight"].data = np.full((8, width), -128, np.int8)
    passes(kernels, data)


def test_masks_are_what_they_are_called() -> None:
    assert not mask_of("none", 9).any()
    assert mask_of("all", 9).all()
    assert np.diff(mask_of("span", 300).astype(int)).tolist().count(1) == 1
    assert np.diff(np.pad(mask_of("spans", 300), 1).astype(int)).tolist().count(1) == 2
