"""Chooses smoothing and scales from a record, layer by layer: the result is a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from calibration import CalibrationError
from calibration.observed.record import Record
from calibration.observed.statistics import Observed, merged, outliers
from calibration.scales.clipping import weight_scale
from calibration.scales.smooth import Candidate, Smoothed, input_scale, output_squares, relative, search, weighting
from export.passes.int8_caches import CachePlan
from export.quantized.plan import MatrixPlan, QuantizationPlan, Smoothing
from export.quantized.quantizable import Matrix
from export.quantized.quantize import LARGEST, Floats, absmax_scale, quantize
from export.quantized.weights import DecoderWeights

HEADROOM = np.float32(1.25)
"""Values of a cache are clipped at the largest observed magnitude times this. A clipped key costs far more than steps
that are a quarter wider (``docs/performance.md``)."""

EXPONENTS = tuple(np.linspace(0, 1, 11).round(2).tolist())
"""Those that ``auto`` smoothing chooses from."""

SEARCH_ROWS = 256
"""How many rows of a matrix the search of smoothing uses."""

SAMPLE = 256
"""How many rows of activations of each phase the reported errors are computed with."""


@dataclass(frozen=True)
class Choice:
    """How scales are chosen.

    Attributes:
        mode: ``w8a16`` or ``w8a8``.
        weights: ``mse``, for the least error weighted by the activations, or ``absmax``, for no clipping.
        activations: one of ``calibration.scales.clipping.METHODS``, for ``w8a8``.
        smoothing: ``auto``, ``off``, or the exponent of all layers.
    """

    mode: str = "w8a16"
    weights: Literal["mse", "absmax"] = "mse"
    activations: str = "mse"
    smoothing: Literal["auto", "off"] | float = "auto"

    @property
    def method(self) -> str | None:
        """How activations are clipped; None where they are not quantized."""
        return self.activations if self.mode == "w8a8" else None

    @property
    def exponents(self) -> tuple[float, ...]:
        """The smoothing exponents to choose from."""
        if isinstance(self.smoothing, float):
            return (self.smoothing,)
        return EXPONENTS if self.smoothing == "auto" else ()


@dataclass(frozen=True)
class MatrixReport:
    """The figures of one quantized matrix.

    Attributes:
        name: of its initializer.
        layer: the index of its layer; None for the head.
        exponent: of the smoothing in front of it; None without smoothing.
        error: ‖output - exact‖² / ‖exact‖² of sampled rows.
        low, high: the range of the activations in front of it, before smoothing.
        outliers: the largest magnitude of a channel, divided by that of the median channel.
        reach: the largest activation that INT8 can hold, divided by the largest observed, both after smoothing; None
            where activations are not quantized.
        rows: how many rows were observed, of prompts and of generated tokens.
    """

    name: str
    layer: int | None
    exponent: float | None
    error: float
    low: float
    high: float
    outliers: float
    reach: float | None
    rows: tuple[int, int]


@dataclass
class Chosen:
    """A plan, and the figures of its matrices."""

    plan: QuantizationPlan
    matrices: list[MatrixReport]


def choose(
    weights: DecoderWeights,
    matrices: Sequence[Matrix],
    record: Record,
    choice: Choice,
    progress: Callable[[int], object],
    kv_cache: bool = False,
) -> Chosen:
    """Chooses smoothing and scales.

    Args:
        weights: of the decoder that is quantized, not smoothed.
        matrices: the matrices to quantize. The record has observed them.
        record: the observations.
        choice: how scales are chosen.
        progress: called with 1 for each matrix that is done.
        kv_cache: whether to choose scales of the caches too.

    Raises:
        CalibrationError: the record does not fit.
    """
    for matrix in matrices:
        if record.observed[matrix.name][0].prompt.channels != matrix.channels:
            raise CalibrationError(f"the record does not fit the bundle: {matrix.name} has {matrix.channels} channels")
    groups: dict[tuple[int | None, str], list[Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.layer, matrix.part), []).append(matrix)
    plans, reports, smoothings = [], [], []
    # Group by group: the samples of one group are in memory twice.
    for (layer, part), members in groups.items():
        candidates = {matrix.name: _candidate(matrix, weights, record.observed[matrix.name]) for matrix in members}
        found: dict[str, Smoothed] = {}
        smoothed = weights
        if part == "feed_forward" and layer is not None:
            smoothing = _smooth(layer, candidates, choice, found)
            if any(item.factor is not None for item in found.values()):
                smoothings.append(smoothing)
                smoothed = weights.smoothed([smoothing])
        for matrix in members:
            plan, report = _matrix(matrix, candidates, found, weights, smoothed, choice)
            plans.append(plan)
            reports.append(report)
            progress(1)
    layers = range(weights.bundle.manifest.model.num_hidden_layers)
    caches = tuple(_cache(layer, record) for layer in layers if kv_cache)
    return Chosen(QuantizationPlan(choice.mode, tuple(plans), tuple(smoothings), caches), reports)


def _cache(layer: int, record: Record) -> CachePlan:
    """Makes scales with which the largest magnitude of each channel, times ``HEADROOM``, becomes 127."""
    largest = (record.caches[f"{layer}.{kind}"] * HEADROOM for kind in ("key", "value"))
    return CachePlan(layer, *(absmax_scale(item.reshape(-1, 1)).reshape(item.shape) for item in largest))


def _smooth(layer: int, candidates: dict[str, Candidate], choice: Choice, found: dict[str, Smoothed]) -> Smoothing:
    """Finds the smoothing of one layer, and adds that of each of its matrices to ``found``."""
    endings = {"gate_up": "gate_up", "down": "text_down", "visual_down": "visual_down"}
    factors: dict[str, Floats | None] = {}
    for group, ending in endings.items():
        members = [name for name in candidates if name.endswith(ending)]
        # The visual expert's gate and up take the inverse of the norm's factors, even where they are not quantized.
        powers = group == "gate_up" and len(members) == 1
        smoothed = search([candidates[name] for name in members], choice.method is not None, choice.exponents, powers)
        factors[group] = smoothed.factor
        found |= dict.fromkeys(members, smoothed)
    return Smoothing(layer, **factors)


def _candidate(matrix: Matrix, weights: DecoderWeights, halves: tuple[Observed, ...]) -> Candidate:
    wanted = np.unique(np.linspace(0, matrix.out - 1, SEARCH_ROWS).astype(np.int64))
    picked, start = [], 0
    largest = np.zeros(matrix.channels, np.float32)
    for block in weights.blocks(matrix.name):
        picked.append(block[wanted[(wanted >= start) & (wanted < start + len(block))] - start])
        np.maximum(largest, np.abs(block).max(axis=0), out=largest)
        start += len(block)
    return Candidate(np.concatenate(picked), largest, merged(halves), halves)


def _matrix(
    matrix: Matrix,
    candidates: dict[str, Candidate],
    found: dict[str, Smoothed],
    plain: DecoderWeights,
    smoothed: DecoderWeights,
    choice: Choice,
) -> tuple[MatrixPlan, MatrixReport]:
    """Makes the plan of one matrix, and its figures, block by block."""
    candidate, smoothing = candidates[matrix.name], found.get(matrix.name, Smoothed())
    observed, factor = candidate.observed, smoothing.over(matrix.channels)
    weights = weighting(observed, factor) if choice.weights == "mse" else None
    # Nothing reaches the visual expert of the last layer. Its activations take the text expert's scale.
    reached = candidate if observed.rows else candidates.get(matrix.name.replace("visual_", "text_"), candidate)
    activations = input_scale(reached, smoothing, choice.method) if choice.method else None
    # Rows of up are divided by the factor of down. Their error is computed at their size before that.
    down = found.get(matrix.name.replace("gate_up", "down"), Smoothed()) if "gate_up" in matrix.name else Smoothed()
    sizes = None if down.factor is None else np.concatenate([np.ones_like(down.factor), down.factor])
    scales, sums, start = [], np.zeros((len(observed.phases), 2)), 0
    for exact, block in zip(plain.blocks(matrix.name), smoothed.blocks(matrix.name), strict=True):
        scale = weight_scale(block, weights)
        quantized = quantize(block, scale) * scale[:, None]
        if sizes is not None:
            quantized *= sizes[start : start + len(block), None]
        sums += output_squares(exact, quantized, observed, factor, activations, SAMPLE)
        scales.append(scale)
        start += len(block)
    most = float((observed.absmax / factor).max())
    report = MatrixReport(
        name=matrix.name,
        layer=matrix.layer,
        exponent=smoothing.exponent,
        error=relative(sums),
        low=min((float(phase.low.min()) for phase in observed.phases), default=0.0),
        high=max((float(phase.high.max()) for phase in observed.phases), default=0.0),
        outliers=outliers(observed.absmax) or 1.0,
        reach=LARGEST * activations / most if activations and most else None,
        rows=(observed.prompt.rows, observed.generated.rows),
    )
    return MatrixPlan(matrix.name, np.concatenate(scales), activations), report
