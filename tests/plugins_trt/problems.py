"""Problems for the kernels, and what float64 says of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from plugins_trt.schema import EXPERT_LINEAR, EXPERTS, FUSED_MOE, MATRICES, OPERATORS, Operator

from .tolerances import ACCUMULATION, PRODUCT_DEVIATIONS, QUANTIZATION_FLIPS, TOLERANCES

NUMPY_TYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
KERNEL_TYPES = ("bfloat16", "float16")
"""Those that the kernels compute in; the operators' bodies compute in all."""


def mask_of(pattern: str, rows: int) -> np.ndarray:
    """Which rows are visual."""
    index = np.arange(rows)
    patterns = {
        "none": np.zeros(rows, bool),
        "all": np.ones(rows, bool),
        "alternating": index % 2 == 1,
        "span": (index >= rows // 4) & (index < rows - rows // 3),
        "spans": (index < rows // 5) | ((index >= rows // 2) & (index < rows - 1)),
    }
    return patterns[pattern]


@dataclass(frozen=True)
class Problem:
    """One call. `size` is inter of FusedMoE and out of ExpertLinear."""

    operator: Operator
    rows: int
    hidden: int
    size: int
    mask: str = "span"
    type: str = "bfloat16"
    text: str = "float"
    visual: str = "float"
    seed: int = 0

    def __str__(self) -> str:
        formats = f"{self.text}+{self.visual}"
        return f"{self.operator.name}-{self.rows}x{self.hidden}x{self.size}-{self.mask}-{self.type}-{formats}"

    @property
    def out(self) -> int:
        return self.hidden if self.operator is FUSED_MOE else self.size

    def shape(self, matrix: str) -> tuple[int, int]:
        return {
            "gate_up": (2 * self.size, self.hidden),
            "down": (self.hidden, self.size),
            "weight": (self.size, self.hidden),
        }[matrix]


@dataclass
class Matrix:
    """As the kernel gets it, and the numbers it stands for."""

    data: np.ndarray
    scale: np.ndarray | None = None
    input_scale: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        wide = self.data.astype(np.float64)
        return wide if self.scale is None else wide * self.scale[:, None].astype(np.float64)


@dataclass
class Data:
    """The tensors of a problem."""

    problem: Problem
    hidden_states: np.ndarray
    mask: np.ndarray
    matrices: dict[str, Matrix] = field(default_factory=dict)


def make(problem: Problem) -> Data:
    """Rows and weights of sizes like a trained model's, so that gate, up and product are about 1."""
    digest = hashlib.sha256(str(problem).encode()).digest()
    generator = np.random.default_rng([problem.seed, *digest[:8]])
    kind = NUMPY_TYPES[problem.type]
    hidden_states = generator.standard_normal((problem.rows, problem.hidden), np.float32).astype(kind)
    data = Data(problem, hidden_states, mask_of(problem.mask, problem.rows))
    for expert in EXPERTS:
        quantization = getattr(problem, expert)
        for name in MATRICES[problem.operator.name]:
            out, inside = problem.shape(name)
            if quantization == "float":
                weights = generator.standard_normal((out, inside), np.float32) / np.sqrt(np.float32(inside))
                matrix = Matrix(weights.astype(kind))
            else:
                weights = generator.integers(-128, 128, (out, inside), np.int8)
                scale = generator.uniform(0.5, 1.5, out) / 74 / np.sqrt(inside)
                matrix = Matrix(weights, scale.astype(np.float32))
                if quantization == "w8a8":
                    # Some of the inputs saturate.
                    matrix.input_scale = np.array([2.5 / 127], np.float32)
            data.matrices[f"{expert}_{name}"] = matrix
    return data


def quantize(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What QuantizeLinear says for float32, zero point 0 and int8."""
    return np.clip(np.rint(values.astype(np.float32) / scale), -128, 127).astype(np.float64)


def _inputs(matrix: Matrix, values: np.ndarray) -> np.ndarray:
    scale = matrix.input_scale
    return values if scale is None else quantize(values, scale) * scale.astype(np.float64)


def reference(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The output in float64, and how far each element may be from it."""
    problem = data.problem
    tolerance = TOLERANCES[problem.type]
    expected = np.zeros((problem.rows, problem.out))
    allowed = np.zeros_like(expected)
    for expert, chosen in (("text", ~data.mask), ("visual", data.mask)):
        if not chosen.any():
            continue
        rows = data.hidden_states[chosen].astype(np.float64)
        if problem.operator is EXPERT_LINEAR:
            matrix = data.matrices[f"{expert}_weight"]
            rows, weights = _inputs(matrix, rows), matrix.values
            magnitude = np.abs(rows) @ np.abs(weights).T
            extra: np.ndarray | float = 0.0
        else:
            gate_up, down = (data.matrices[f"{expert}_{name}"] for name in MATRICES[problem.operator.name])
            rows = _inputs(gate_up, rows)
            gate, up = np.split(rows @ gate_up.values.T, 2, axis=1)
            spread = np.abs(rows) @ np.abs(gate_up.values).T
            gate_spread, up_spread = np.split(spread, 2, axis=1)
            with np.errstate(over="ignore"):
                rows = _inputs(down, gate / (1 + np.exp(-gate)) * up)
            weights = down.values
            # |silu'| < 1.1; the product's magnitude is what errors of gate and up are multiplied with.
            magnitude = (np.abs(rows) + 1.1 * gate_spread * np.abs(up) + np.abs(gate) * up_spread) @ np.abs(weights).T
            if down.input_scale is None:
                deviation = np.sqrt(rows**2 @ (weights**2).T)
                extra = PRODUCT_DEVIATIONS * tolerance.unit_roundoff * deviation
                extra = extra + tolerance.smallest / 2 * np.abs(weights).sum(axis=1)
            else:
                extra = QUANTIZATION_FLIPS * float(down.input_scale[0]) * np.abs(weights).max(axis=1)
        result = rows @ weights.T
        expected[chosen] = result
        allowed[chosen] = (
            tolerance.unit_roundoff * np.abs(result) + tolerance.smallest / 2 + extra + ACCUMULATION * magnitude
        )
    return expected, allowed


def check(data: Data, got: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> None:
    """Fails with the whole problem and its worst element."""
    wide = got.astype(np.float64)
    assert wide.shape == expected.shape
    if not wide.size:
        return
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isfinite(wide), np.abs(wide - expected) / allowed, np.inf)
    worst = np.unravel_index(excess.argmax(), excess.shape)
    row, column = (int(i) for i in worst)
    assert excess[worst] <= 1, (
        f"{data.problem!r}: {np.count_nonzero(excess > 1)} of {excess.size} elements are off; the worst is row {row} "
        f"({'visual' if data.mask[row] else 'text'}), column {column}: got {wide[worst]!r}, expected "
        f"{expected[worst]!r} ± {allowed[worst]:.3g}"
    )


FACTORS = {
    "operator": OPERATORS,
    "rows": (1, 7, 16, 17, 128, 300),
    # hidden and size: whole tiles, parts of a tile, parts of a piece, and what only the generic path takes.
    "sizes": (
        (64, 64),
        (256, 384),
        (128, 1024),
        (2048, 64),
        (80, 2048),
        (2048, 2048),
        (1040, 208),
        (136, 72),
        (65, 66),
        (100, 260),
    ),
    "mask": ("none", "all", "alternating", "span", "spans"),
    "type": KERNEL_TYPES,
    "text": ("float", "w8a16", "w8a8"),
    "visual": ("float", "w8a16", "w8a8"),
}
WORK_LIMIT = 6e8
"""Additions and multiplications that a problem may take; an emulated second is about 1e9."""


def covering() -> list[Problem]:
    """Problems in which each two levels of different factors meet, as far as the work allows. Greedy, and always the
    same."""
    generator = np.random.default_rng(0)
    names = tuple(FACTORS)

    def work(row: tuple) -> float:
        values = dict(zip(names, row, strict=True))
        hidden, size = values["sizes"]
        return (6 if values["operator"] is FUSED_MOE else 2) * max(values["rows"], 8) * hidden * size

    def pairs(row: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
        return itertools.combinations(enumerate(row), 2)

    def level(index: tuple[int, ...]) -> tuple:
        return tuple(FACTORS[name][i] for name, i in zip(names, index, strict=True))

    counts = [len(FACTORS[name]) for name in names]
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(counts[a])
        for j in range(counts[b])
    }
    chosen = []
    while missing:
        wanted = min(missing)
        best: tuple[int, tuple[int, ...]] = (0, ())
        for _ in range(60):
            index = [int(generator.integers(count)) for count in counts]
            for factor, i in wanted:
                index[factor] = i
            if work(level(tuple(index))) <= WORK_LIMIT:
                best = max(best, (len(missing & set(pairs(tuple(index)))), tuple(index)))
        missing.discard(wanted)
        if best[1]:
            missing -= set(pairs(best[1]))
            values = dict(zip(names, level(best[1]), strict=True))
            hidden, size = values.pop("sizes")
            chosen.append(Problem(hidden=hidden, size=size, **values))
    return chosen
