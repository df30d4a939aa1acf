"""The plugin from its creator to the answer, on pointers of the host, against float64.

``steps.py`` says what is real here and what is played.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from plugins_trt.schema import FUSED_MOE, PLUGIN_OPERATORS, Operator

from ..operators.bodies import arrays_of, problem_of
from ..problems import KERNEL_TYPES, Data, check, make, reference
from .steps import Context, Steps, Tensors, build_steps, tensors_of

SIZES = {"in": 64, "inter": 96, "out": 32}
UNKNOWN = {"batch": -1, "sequence": -1}


@pytest.fixture
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """The plugin for a CPU."""
    return build_steps(tmp_path_factory.getbasetemp())


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
