"""The plugin from its creator to the answer, on pointers of the host, against float64; and what it refuses.

``steps.py`` says what is real here and what is played.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins_trt.schema import FUSED_MOE, PLUGIN_OPERATORS, W8A8, Operator, quantized

from ..operators.bodies import arrays_of, problem_of
from ..problems import KERNEL_TYPES, Data, check, make, reference
from .steps import ERROR, HWC8, NODE, WARNING, Context, Steps, Tensors, build_steps, changed, tensors_of

SIZES = {"in": 64, "inter": 96, "out": 32}
UNKNOWN = {"batch": -1, "sequence": -1}
IMPOSSIBLE = 1 << 62
"""The workspace that no device has, which stops a build."""


@pytest.fixture
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """The plugin for a CPU."""
    return build_steps(tmp_path_factory.getbasetemp())


@pytest.fixture
def fresh(steps: Steps, tmp_path: Path) -> Steps:
    """The same as a process finds it that has just loaded it: nothing was reported yet."""
    copy = shutil.copy(steps.path, tmp_path / "libfresh.so")
    return Steps(Path(copy), steps.kernels)


def profile(operator: Operator, batch: int, sequence: int, kind: str = "bfloat16", **sizes: int) -> Tensors:
    """The tensors of a node while it is built, for up to so many rows."""
    return tensors_of(operator, kind, {**SIZES, **UNKNOWN, **sizes}, {"batch": batch, "sequence": sequence})


def call(operator: Operator, batch: int, sequence: int, kind: str = "bfloat16", **sizes: int) -> Tensors:
    """The tensors of a call."""
    return tensors_of(operator, kind, {**SIZES, "batch": batch, "sequence": sequence, **sizes}, {})


def example(
    operator: Operator, batch: int, sequence: int, kind: str = "bfloat16", mask: str = "alternating"
) -> tuple[Data, Mapping[str, np.ndarray]]:
    """Numbers for a call."""
    size = SIZES["inter" if operator.family == FUSED_MOE.name else "out"]
    data = make(problem_of(operator, batch * sequence, SIZES["in"], size, mask, kind))
    arrays = arrays_of(data, operator, kind)
    for name in ("hidden_states", "visual_mask"):
        arrays[name] = arrays[name].reshape(batch, sequence, *arrays[name].shape[2:])
    return data, arrays


def agrees(data: Data, output: np.ndarray) -> None:
    check(data, output.reshape(data.problem.rows, data.problem.out), *reference(data))


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 3), (1, 20), (3, 50)])
@pytest.mark.parametrize("kind", KERNEL_TYPES)
@pytest.mark.parametrize("operator", PLUGIN_OPERATORS, ids=lambda operator: operator.name)
def test_agrees_with_float64(steps: Steps, operator: Operator, kind: str, batch: int, sequence: int) -> None:
    """Each path of the kernels, in as much workspace as was asked for and no byte more."""
    engine, workspace = steps.engine(operator, profile(operator, batch, sequence, kind))
    data, arrays = example(operator, batch, sequence, kind)
    agrees(data, Context(engine, workspace).run(call(operator, batch, sequence, kind), arrays))
    assert steps.errors() == []


@pytest.mark.parametrize("operator", PLUGIN_OPERATORS, ids=lambda operator: operator.name)
def test_contexts_of_one_engine_do_not_touch_each_other(steps: Steps, operator: Operator) -> None:
    """One decodes while the other computes long prompts; calls alternate, and shapes change when they do."""
    engine, workspace = steps.engine(operator, profile(operator, 2, 40), profile(operator, 1, 1))
    contexts = [Context(engine, workspace) for _ in range(2)]
    for shapes in ([(2, 40), (1, 1)], [(1, 17), (1, 1)], [(2, 40), (1, 40)]):
        tensors = [call(operator, *shape) for shape in shapes]
        data, arrays = zip(*(example(operator, *shape) for shape in shapes), strict=True)
        for context, described in zip(contexts, tensors, strict=True):
            assert context.plugin.shape_change(described) == 0
        bound = [context.bind(*given) for context, *given in zip(contexts, tensors, arrays, strict=True)]
        for turn in (0, 1, 0, 1):
            bound[turn]["output"].view(np.uint8)[:] = 0xFF
            assert contexts[turn].enqueue(tensors[turn], bound[turn]) == 0
            agrees(data[turn], bound[turn]["output"])
    contexts[0].plugin.release()
    agrees(data[1], contexts[1].run(tensors[1], arrays[1]))
    assert steps.errors() == []


def test_a_workspace_for_the_largest_call_serves_the_others(steps: Steps) -> None:
    engine, workspace = steps.engine(FUSED_MOE, profile(FUSED_MOE, 2, 40))
    context = Context(engine, workspace)
    for batch, sequence in ((2, 40), (1, 1), (2, 16), (1, 0)):
        data, arrays = example(FUSED_MOE, batch, sequence)
        agrees(data, context.run(call(FUSED_MOE, batch, sequence), arrays))


# What is refused ------------------------------------------------------------------------------------------------------

Change = Callable[[Tensors], Tensors]


def tensor_is(name: str, **values: Any) -> Change:
    return lambda tensors: changed(tensors, name, **values)


W8A8_BOTH = quantized(FUSED_MOE, W8A8, W8A8)
REFUSED: dict[str, tuple[Change, str]] = {
    "rank": (
        tensor_is("hidden_states", shape=(40, 64), most=(40, 64)),
        "hidden_states must have 3 dimensions, [batch, sequence, in], got [40, 64]",
    ),
    "more dimensions than there are names": (
        tensor_is("visual_mask", shape=(1,) * 8, most=(1,) * 8),
        "visual_mask must have 2 dimensions, [batch, sequence], got [1, 1, 1, 1, 1, 1, 1, 1]",
    ),
    "a matrix transposed": (
        tensor_is("text_down", shape=(96, 64), most=(96, 64)),
        "text_down must be [in, inter] = [64, 96], got [96, 64]",
    ),
    "rows of the output": (
        tensor_is("output", shape=(2, 39, 64), most=(2, 39, 64)),
        "output must be [batch, sequence, in] = [2, 40, 64], got [2, 39, 64]",
    ),
    "float32": (
        lambda tensors: {
            name: tensor if tensor.type != "bfloat16" else changed(tensors, name, type="float32")[name]
            for name, tensor in tensors.items()
        },
        "hidden_states must be bfloat16 or float16, got float32; export the model with --dtype bf16",
    ),
    "matrix of another type": (tensor_is("visual_down", type="bfloat16"), "visual_down must be int8, got bfloat16"),
    "scales of another type": (
        tensor_is("text_down_scale", type="bfloat16"),
        "text_down_scale must be float32, got bfloat16",
    ),
    "output of another type": (
        tensor_is("output", type="float16"),
        "output must be bfloat16 like the node's first input, got float16",
    ),
    "another layout": (
        tensor_is("hidden_states", format=HWC8),
        f"hidden_states must be in the linear layout, got TensorRT's format {HWC8}",
    ),
}


@pytest.mark.parametrize("stage", ["configure", "shape_change", "enqueue"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(steps: Steps, case: tuple[Change, str], stage: str) -> None:
    """Everywhere in one line that names the node, with nothing written; and the next call is as good as ever."""
    change, message = case
    parsed = steps.create(W8A8_BOTH)
    if stage == "configure":
        assert parsed.configure(change(call(W8A8_BOTH, 2, 40))) == -1
        assert steps.log() == [(ERROR, f"[monoedge] {NODE}: {message}")]
        assert parsed.configure(profile(W8A8_BOTH, 2, 40)) == 0
        return
    engine, workspace = steps.engine(W8A8_BOTH, profile(W8A8_BOTH, 2, 40))
    steps.log()
    context, tensors = Context(engine, workspace), call(W8A8_BOTH, 2, 40)
    data, arrays = example(W8A8_BOTH, 2, 40)
    wrong = change(tensors)
    if stage == "shape_change":
        assert context.plugin.shape_change(wrong) == -1
    else:
        bound = context.bind(tensors, arrays)
        before = bound["output"].tobytes()
        assert context.enqueue(wrong, bound) == -1
        assert bound["output"].tobytes() == before
    assert steps.log() == [(ERROR, f"[monoedge] {NODE}: {message}")]
    agrees(data, context.run(tensors, arrays))


def test_a_tensor_too_few(steps: Steps) -> None:
    """Wherever TensorRT says how many there are."""
    names = ", ".join(tensor.name for tensor in W8A8_BOTH.inputs)
    line = (
        f"FusedMoEW8A8 version 1 must have 14 inputs ({names}) and 1 output, got 13 and 1; export the model with the "
        "monoedge that this plugin comes with"
    )
    plugin = steps.create(W8A8_BOTH)
    tensors = call(W8A8_BOTH, 2, 40)
    fewer = {name: tensors[name] for name in tensors if name != "visual_down_input_scale"}
    assert "hidden_states" not in plugin.supports(fewer)
    assert (plugin.configure(fewer), plugin.workspace(fewer), plugin.shape_change(fewer)) == (-1, IMPOSSIBLE, -1)
    assert steps.log() == [(ERROR, f"[monoedge] {NODE}: {line}")] * 3


def test_a_profile_without_a_largest_shape(steps: Steps) -> None:
    """A workspace for no rows would be written behind its end by the first call."""
    parsed = steps.create(FUSED_MOE)
    line = "hidden_states must have a known shape, [batch, sequence, in], got one without batch"
    endless = tensors_of(FUSED_MOE, "bfloat16", {**SIZES, **UNKNOWN}, {})
    assert parsed.configure(endless) == -1
    assert parsed.workspace(endless) == IMPOSSIBLE
    assert steps.log() == [(ERROR, f"[monoedge] {NODE}: {line}")] * 2


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (701, "cudaErrorLaunchOutOfResources (emulated) with batch 1, sequence 20, in 64, inter 96"),
        (
            209,
            "cudaErrorNoKernelImageForDevice (emulated) with batch 1, sequence 20, in 64, inter 96; build the library "
            "for this GPU: monoedge plugin",
        ),
        (
            222,
            "cudaErrorUnsupportedPtxVersion (emulated) with batch 1, sequence 20, in 64, inter 96; build the library "
            "for this GPU: monoedge plugin",
        ),
    ],
)
def test_a_launch_that_fails(steps: Steps, status: int, words: str) -> None:
    engine, workspace = steps.engine(FUSED_MOE, profile(FUSED_MOE, 1, 20))
    context, tensors = Context(engine, workspace), call(FUSED_MOE, 1, 20)
    data, arrays = example(FUSED_MOE, 1, 20)
    steps.kernels.emulate(failing_launch=0, failure=status)
    assert context.enqueue(tensors, context.bind(tensors, arrays)) == -1
    assert steps.errors() == [f"[monoedge] {NODE}: FusedMoE could not be launched: {words}"]
    agrees(data, context.run(tensors, arrays))


@pytest.mark.parametrize("name", ["hidden_states", "visual_mask", "text_gate_up", "visual_down", "output"])
def test_a_tensor_that_is_nowhere(steps: Steps, name: str) -> None:
    engine, workspace = steps.engine(FUSED_MOE, profile(FUSED_MOE, 1, 20))
    context, tensors = Context(engine, workspace), call(FUSED_MOE, 1, 20)
    bound = context.bind(tensors, example(FUSED_MOE, 1, 20)[1])
    addresses = {other: 0 if other == name else array.ctypes.data for other, array in bound.items()}
    space = bound["hidden_states"].ctypes.data  # Nothing is written there.
    before = bound["hidden_states"].tobytes()
    assert context.plugin.enqueue(tensors, addresses, space) == -1
    assert bound["hidden_states"].tobytes() == before
    (line,) = steps.errors()
    assert "could not be launched: cudaErrorInvalidValue" in line


@pytest.mark.parametrize(
    ("node", "shown"),
    [("", "FusedMoE"), ("a" * 5000, "a" * 200), ("a" + 5000 * "é", "a" + 99 * "é"), ("%s%n/é", "%s%n/é")],
    ids=["none", "long", "cut between bytes", "odd"],
)
def test_names_of_nodes(steps: Steps, node: str, shown: str) -> None:
    """Whatever a graph calls them, the line says what is wrong."""
    engine, _ = steps.engine(FUSED_MOE, profile(FUSED_MOE, 1, 20), node=node)
    assert engine.shape_change(tensor_is("hidden_states", shape=(1, 64))(call(FUSED_MOE, 1, 20))) == -1
    words = "hidden_states must have 3 dimensions, [batch, sequence, in], got [1, 64]"
    assert steps.errors() == [f"[monoedge] {shown}: {words}"]


def test_without_a_logger_errors_go_to_standard_error(steps: Steps, capfd: pytest.CaptureFixture[str]) -> None:
    steps.use_logger(used=False)
    try:
        assert steps.create(FUSED_MOE).configure(call(W8A8_BOTH, 1, 1)) == -1
        steps.create(FUSED_MOE).workspace(profile(FUSED_MOE, 1, 1))
    finally:
        steps.use_logger(used=True)
    assert re.fullmatch(rf"\[monoedge\] {NODE}: FusedMoE version 1 must have 6 inputs [^\n]*\n", capfd.readouterr().err)


# The slow path --------------------------------------------------------------------------------------------------------


def slow(name: str, behind: int) -> tuple[int, str]:
    return (
        WARNING,
        f"[monoedge] {NODE}: {name} must begin at a multiple of 16 bytes, got an address {behind} bytes behind one; "
        "the kernels for anything else are many times slower: bind memory that begins where cudaMalloc's does",
    )


@pytest.mark.parametrize("name", ["hidden_states", "text_gate_up", "visual_down", "output"])
@pytest.mark.parametrize("operator", [FUSED_MOE, W8A8_BOTH], ids=lambda operator: operator.name)
def test_an_unaligned_tensor_is_told_once(fresh: Steps, operator: Operator, name: str) -> None:
    """Also where one process has many such nodes, and calls them for each token."""
    engine, workspace = fresh.engine(operator, profile(operator, 1, 20))
    data, arrays = example(operator, 1, 20)
    contexts = [Context(engine, workspace) for _ in range(2)]
    for context in contexts:
        agrees(data, context.run(call(operator, 1, 20), arrays))
        assert fresh.log() == []
    for _ in range(2):
        for context in contexts:
            agrees(data, context.run(call(operator, 1, 20), arrays, {name: 2}))
    assert fresh.log() == [slow(name, 2)]


@pytest.mark.parametrize("name", ["visual_mask", "text_down_scale", "text_down_input_scale"])
def test_what_is_read_one_by_one_may_begin_anywhere(fresh: Steps, name: str) -> None:
    engine, workspace = fresh.engine(W8A8_BOTH, profile(W8A8_BOTH, 1, 20))
    data, arrays = example(W8A8_BOTH, 1, 20)
    agrees(data, Context(engine, workspace).run(call(W8A8_BOTH, 1, 20), arrays, {name: 4}))
    assert fresh.errors() == []


@pytest.mark.parametrize(
    ("operator", "sizes", "is_slow"),
    [
        (FUSED_MOE, {"in": 64, "inter": 100}, True),
        (FUSED_MOE, {"in": 72, "inter": 104}, False),
        (quantized(FUSED_MOE, "w8a16"), {"in": 72, "inter": 104}, True),
        (W8A8_BOTH, {"in": 80, "inter": 112}, False),
    ],
    ids=lambda value: value.name if isinstance(value, Operator) else str(value),
)
def test_sizes_are_told_while_an_engine_is_built(
    fresh: Steps, operator: Operator, sizes: dict[str, int], is_slow: bool
) -> None:
    parsed = fresh.create(operator)
    for _ in range(2):
        assert parsed.configure(profile(operator, 1, 20, **sizes)) == 0
    line = (
        f"[monoedge] {NODE}: sizes must be multiples of 8, and of 16 where rows of int8 matrices are summed, got "
        f"batch 1, sequence 20, in {sizes['in']}, inter {sizes['inter']}; the kernels for anything else are many times "
        "slower: pad the matrices with zeros"
    )
    assert fresh.log() == ([(WARNING, line)] if is_slow else [])
