"""What the kernels promise beside the right numbers: what is read and written, launched and refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from plugins_trt.schema import EXPERT_LINEAR, FUSED_MOE, OPERATORS

from .kernels import INVALID_VALUE, OUT_OF_RESOURCES, POISON, SUCCESS, Kernels, build_for_cpu, fenced, passes
from .problems import MATRICES, Problem, make


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels for a CPU: threads are fibers."""
    kernels = build_for_cpu(tmp_path_factory.getbasetemp())
    kernels.emulate()
    return kernels


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_no_rows(kernels: Kernels, operator: object) -> None:
    """Success without a launch whatever the pointers are, also for sizes of the generic path."""
    for size in (64, 65):
        problem = Problem(operator, 0, 64, size)
        nowhere = {"hidden_states": 0, "visual_mask": 0, "output": 0, "workspace": 0}
        assert kernels.call(problem, kernels.params(problem, nowhere, 0)) == SUCCESS
        assert kernels.library.monoedgeLaunches() == 0


@pytest.mark.parametrize("text", ["float", "w8a16", "w8a8"])
@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (8, 1), (9, 1), (16, 1), (17, 1), (150, 3)])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_weights_are_read_once(kernels: Kernels, operator: object, rows: int, tiles: int, text: str) -> None:
    """For all rows at decode; for each tile of rows at prefill. Small tiles have 64 rows."""
    data = make(Problem(operator, rows, 208, 80, "none", text=text))
    for name, matrix in data.matrices.items():
        kernels.run(data, watched=name)
        expected = tiles * matrix.data.nbytes if name.startswith("text") else 0
        assert kernels.library.monoedgeCopiedBytes() == expected, name


LAUNCHES = {
    # rows, size: of FusedMoE and of ExpertLinear, with no matrix in int8
    (5, 64): (2, 1),
    (40, 64): (3, 2),
    (5, 65): (3, 2),
}


@pytest.mark.parametrize("text", ["float", "w8a16", "w8a8"])
@pytest.mark.parametrize("case", LAUNCHES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_launches(kernels: Kernels, operator: object, case: tuple[int, int], text: str) -> None:
    """As few as docs/kernels.md says; the status of one that fails is returned, and none follows it."""
    rows, size = case
    data = make(Problem(operator, rows, 64, size, text=text))
    kernels.emulate()
    passes(kernels, data)
    count = LAUNCHES[case][operator is EXPERT_LINEAR] + (text == "w8a8")
    assert kernels.library.monoedgeLaunches() == count
    for failing in range(count):
        kernels.emulate(failing_launch=failing)
        status, _ = kernels.run(data)
        assert (status, kernels.library.monoedgeLaunches()) == (OUT_OF_RESOURCES, failing + 1)


def test_shared_memory_meets_all_banks_once(kernels: Kernels) -> None:
    """Eight lanes move 16 bytes each at a time: of no two may the places be equal modulo 128 bytes."""
    place = kernels.library.monoedgePlaceOf
    places = {place(line, chunk) for line in range(64) for chunk in range(8)}
    assert places == set(range(0, 64 * 128, 16))
    for line in range(0, 64, 2):
        neighbours = [(line + i, quad) for i in range(2) for quad in range(4)]
        together = [
            [(line, chunk) for chunk in range(8)],  # copies of 128 bytes a line
            *([(at, 4 * block + quad) for at, quad in neighbours] for block in range(2)),  # copies of 64, operands
            *([(at, 2 * quad + part) for at, quad in neighbours] for part in range(2)),  # operands beside int8 weights
        ]
        for lanes in together:
            assert len({place(*lane) % 128 for lane in lanes}) == 8, lanes


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("expert", ["text", "visual"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_an_expert_without_rows_is_not_read(kernels: Kernels, operator: object, expert: str, rows: int) -> None:
    """Weights and scales at an address where nothing is mapped: reading them would end the process."""
    mask = "all" if expert == "text" else "none"
    for size, quantization in itertools.product((96, 65), ("float", "w8a16", "w8a8")):
        data = make(Problem(operator, rows, 112, size, mask, **{expert: quantization}))
        passes(kernels, data, unmapped=(expert,))


@pytest.mark.parametrize("text", ["float", "w8a16", "w8a8"])
@pytest.mark.parametrize("sizes", [(208, 80), (65, 66)], ids=str)
@pytest.mark.parametrize("rows", [3, 13, 40, 150])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_nothing_behind_a_tensor_is_read(
    kernels: Kernels, operator: object, rows: int, sizes: tuple[int, int], text: str
) -> None:
    """Nothing is mapped there: reading it would end the process. Tiles and pieces are partly filled."""
    passes(kernels, make(Problem(operator, rows, *sizes, "spans", text=text)), allocate=fenced)


@pytest.mark.parametrize("rows", [8, 60])
@pytest.mark.parametrize("poisoned", ["text", "visual"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_row_never_touches_the_other_expert(kernels: Kernels, operator: object, poisoned: str, rows: int) -> None:
    """NaN and inf in rows and weights of one expert leave the other's rows as they are, bit for bit."""
    for size in (96, 65):
        data = make(Problem(operator, rows, 112, size, "alternating", "float16"))
        others = data.mask if poisoned == "text" else ~data.mask
        clean = passes(kernels, data)
        for name in MATRICES[operator.name]:
            weights = data.matrices[f"{poisoned}_{name}"].data
            weights[:, ::2], weights[:, 1::2] = np.nan, np.inf
        data.hidden_states[~others] = -np.inf
        status, output = kernels.run(data)
        assert status == SUCCESS
        np.testing.assert_array_equal(output[others], clean[others])
        assert not np.isfinite(output[~others].astype(np.float32)).any()


@pytest.mark.parametrize("rows", [8, 60])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_row_does_not_depend_on_its_company(kernels: Kernels, operator: object, rows: int) -> None:
    """Other rows, good or not, change no bit of it, nor does the place where it stands."""
    for size in (96, 65):
        data = make(Problem(operator, rows, 112, size, "spans"))
        clean = passes(kernels, data)
        turned = replace(data, hidden_states=data.hidden_states[::-1].copy(), mask=data.mask[::-1].copy())
        turned.hidden_states[:3] = np.nan
        status, output = kernels.run(turned)
        assert status == SUCCESS
        np.testing.assert_array_equal(output[::-1][:-3].view(np.uint16), clean[:-3].view(np.uint16))


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_unaligned_tensors_take_the_slow_path(kernels: Kernels, operator: object, rows: int) -> None:
    for text in ("float", "w8a8"):
        data = make(Problem(operator, rows, 64, 96, "spans", text=text))
        passes(kernels, data, offset=2)
        for name in ("hidden_states", "output", *data.matrices):
            passes(kernels, data, offset=2, moved=(name,))


def test_matrices_that_do_not_begin_a_line(kernels: Kernels) -> None:
    """16 bytes are enough for the fast paths."""
    for rows in (5, 40):
        passes(kernels, make(Problem(FUSED_MOE, rows, 64, 96, "spans", text="w8a16")), offset=16)


@pytest.mark.parametrize(
    "changed",
    [
        {"workspaceSize": -1},
        {"rows": -1},
        {"rows": 1 << 40},
        {"type": 7},
        {"hiddenStates": None},
        {"visualMask": None},
        {"output": None},
        {"workspace": None},
        {"hidden": 0},
        {"inter": -64},
        {"inter": 1 << 40},
    ],
    ids=str,
)
def test_refused(kernels: Kernels, changed: dict[str, int | None]) -> None:
    """As cudaErrorInvalidValue, with nothing written."""
    data = make(Problem(FUSED_MOE, 20, 64, 96))
    if "workspaceSize" in changed:
        changed = {"workspaceSize": kernels.workspace(data.problem) - 1}
    status, output = kernels.run(data, **changed)
    assert status == INVALID_VALUE
    assert (output.view(np.uint8) == POISON).all()


@pytest.mark.parametrize("name", ["hidden_states", "output", "workspace", "text_weight", "visual_weight.scale"])
def test_addresses_that_cannot_be(kernels: Kernels, name: str) -> None:
    """Odd ones, and a workspace that is not aligned."""
    problem = Problem(EXPERT_LINEAR, 4, 64, 64, visual="w8a16")
    names = ("hidden_states", "visual_mask", "output", "workspace", "text_weight", "visual_weight")
    addresses = {**dict.fromkeys((*names, "visual_weight.scale"), 4096), name: 4097}
    assert kernels.call(problem, kernels.params(problem, addresses, 1 << 20)) == INVALID_VALUE


def test_weights_that_cannot_be(kernels: Kernels) -> None:
    problem = Problem(EXPERT_LINEAR, 4, 64, 64)
    names = ("hidden_states", "visual_mask", "output", "workspace", "text_weight", "visual_weight")
    addresses = dict.fromkeys(names, 4096)
    for wrong in ({"text_weight": 0}, {"visual_weight": 0}, {"text_weight.input_scale": 4096}):
        params = kernels.params(problem, {**addresses, **wrong}, 1 << 20)
        assert kernels.call(problem, params) == INVALID_VALUE
    # Sums of so many products of int8 might leave int32.
    deep = replace(problem, hidden=1 << 17)
    addresses |= {"text_weight.scale": 4096, "text_weight.input_scale": 4096}
    assert kernels.call(deep, kernels.params(deep, addresses, 1 << 30)) == INVALID_VALUE


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_workspace_grows_with_each_size(kernels: Kernels, operator: object) -> None:
    def size(rows: int, hidden: int, inter: int) -> int:
        return kernels.workspace(Problem(operator, rows, hidden, inter))

    grid = list(itertools.product((0, 1, 17, 300), (8, 65, 2048), (8, 65, 2048)))
    for small, large in itertools.product(grid, grid):
        if all(a <= b for a, b in zip(small, large, strict=True)):
            assert size(*small) <= size(*large)
