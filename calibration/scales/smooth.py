"""Smoothing: outliers of activations are moved into the weights, as x / s and W · s.

The factors follow SmoothQuant (arXiv 2211.10438): channel j gets s_j = max|x_j|^a / max|W_j|^(1 - a). The exponent a is
the one that leaves the least error, for each layer; no smoothing is also a choice. A factor of a matrix that is not
quantized is a power of two, which is exact in every number format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.observed.statistics import Observed
from calibration.scales.clipping import Weighting, activation_scale, fake_quantized
from export.quantized.quantize import LARGEST, Floats, absmax_scale, quantize

SEARCH_SAMPLE, WEIGHTING_ROWS = 64, 128
"""How many rows of activations of each phase the searches use: of smoothing, and of the weights' scales."""

PAYS = 0.8
"""Smoothing must leave less than this fraction of the error. A smaller gain is as likely to be a loss on other data."""

_LARGEST_POWER = 20
"""Factors stay within 2**-20 … 2**20, so that no norm's weight overflows or underflows."""


@dataclass(frozen=True)
class Candidate:
    """A matrix that may be smoothed.

    Attributes:
        weight: evenly spaced rows of it, [rows, in].
        largest: largest magnitude of each column of the whole matrix, [in].
        observed: the activations in front of it.
        halves: those of each half of the examples.
    """

    weight: Floats
    largest: Floats
    observed: Observed
    halves: tuple[Observed, ...]

    @property
    def tries(self) -> list[tuple[int | None, Observed, Observed]]:
        """Pairs of halves, after the number of the first: one to choose with, the other to try the choice on.

        If a half is empty, there is one pair: all observations twice, after None.
        """
        if not all(half.rows for half in self.halves):
            return [(None, self.observed, self.observed)]
        return [(index, half, self.halves[1 - index]) for index, half in enumerate(self.halves)]


@dataclass(frozen=True)
class Smoothed:
    """How the activations in front of a matrix are smoothed.

    Attributes:
        exponent: None for no smoothing.
        factor: [in]; None for no smoothing.
        halves: the factors from each half of the examples alone.
    """

    exponent: float | None = None
    factor: Floats | None = None
    halves: tuple[Floats, ...] = ()

    def over(self, channels: int, half: int | None = None) -> Floats:
        """Returns the factors from all examples or from one half; 1 for no smoothing."""
        factor = self.halves[half] if half is not None and self.halves else self.factor
        return np.ones(channels, np.float32) if factor is None else factor


def factors(absmax: Floats, largest: Floats, exponent: float, powers: bool) -> Floats:
    """Computes the factors of one exponent, [in]; 1 for channels without activations or weights.

    Args:
        absmax: largest magnitude of each channel of the activations, [in].
        largest: largest magnitude of each column of the weights, [in].
        exponent: 0 … 1.
        powers: whether factors are rounded to powers of two.
    """
    there = (absmax > 0) & (largest > 0)
    logarithms = np.zeros(len(absmax))
    activations, weights = (np.log2(values[there].astype(np.float64)) for values in (absmax, largest))
    logarithms[there] = exponent * activations - (1 - exponent) * weights
    if there.any():
        logarithms[there] -= logarithms[there].mean()
    logarithms = logarithms.clip(-_LARGEST_POWER, _LARGEST_POWER)
    return np.exp2(np.rint(logarithms) if powers else logarithms).astype(np.float32)


def smoothed(candidates: Sequence[Candidate], exponent: float, powers: bool) -> Smoothed:
    """Computes the smoothing of matrices that share their activations, as ``factors`` does."""
    largest = np.maximum.reduce([item.largest for item in candidates])
    whole, *halves = (
        factors(np.maximum.reduce([observed.absmax for observed in shared]), largest, exponent, powers)
        for shared in zip(*((item.observed, *item.halves) for item in candidates), strict=True)
    )
    return Smoothed(exponent, whole, tuple(halves))


def search(candidates: Sequence[Candidate], activations: bool, exponents: Sequence[float], powers: bool) -> Smoothed:
    """Finds the smoothing with the least error for matrices that share their activations; see ``PAYS``.

    Factors from one half of the examples are tried on the other half. Otherwise channels that are small in one half
    would get factors that let them saturate with other questions.

    Args:
        candidates: the down matrix of one expert, or gate and up of both.
        activations: whether activations will be quantized too.
        exponents: to choose from. A single one is always taken.
        powers: whether factors are powers of two.
    """
    seen = [item for item in candidates if item.observed.rows]
    choices = [smoothed(seen, exponent, powers) for exponent in exponents] if seen else []
    if len(choices) <= 1:
        return choices[0] if choices else Smoothed()
    # Nothing is clipped here: the gain of clipping is about the same with every exponent.
    part = 1.0 if activations else None
    none, *errors = (
        float(np.mean([_error(item, choice, part, quantized=True) for item in seen]))
        for choice in [Smoothed(), *choices]
    )
    best = int(np.argmin(errors))
    return choices[best] if errors[best] < PAYS * none else Smoothed()


def _error(matrix: Candidate, choice: Smoothed, part: float | None, quantized: bool) -> float:
    """Computes the output's relative error with activations clipped at ``part`` of the largest; None: unquantized."""
    errors = []
    for half, seen, other in matrix.tries:
        factor = choice.over(matrix.weight.shape[1], half)
        scale = None if part is None else part * (max(float((seen.absmax / factor).max()), 1e-30) / LARGEST)
        weight = matrix.weight * factor
        if quantized:
            rows = absmax_scale(weight)
            weight = quantize(weight, rows) * rows[:, None]
        errors.append(relative(output_squares(matrix.weight, weight, other, factor, scale, SEARCH_SAMPLE)))
    return float(np.mean(errors))


def weighting(observed: Observed, factor: Floats) -> Weighting:
    """Returns the weights of errors in smoothed weights."""
    rows = observed.weighted_rows(WEIGHTING_ROWS) / factor
    return Weighting(observed.importance / factor.astype(np.float64) ** 2, rows)


def input_scale(matrix: Candidate, choice: Smoothed, method: str) -> float:
    """Chooses the scale of smoothed activations by one of ``calibration.scales.clipping.METHODS``."""
    factor = choice.over(matrix.weight.shape[1])
    sample = np.concatenate([matrix.observed.prompt.sample, matrix.observed.generated.sample])
    values, largest = np.divide(sample, factor, dtype=np.float32), float((matrix.observed.absmax / factor).max())
    return activation_scale(values, largest, method, lambda part: _error(matrix, choice, part, False))


def output_squares(
    weight: Floats, quantized: Floats, observed: Observed, factor: Floats, scale: float | None, rows: int
) -> npt.NDArray[np.float64]:
    """Returns ‖quantized · x/s - weight · x‖² and ‖weight · x‖² over the sampled rows x of each phase: [phases, 2]."""
    sums = []
    for phase in observed.phases:
        exact = phase.sample[:rows] @ weight.T
        given = phase.sample[:rows] / factor
        given = fake_quantized(given, scale) if scale is not None else given
        off = given @ quantized.T - exact
        sums.append([np.square(values, dtype=np.float64).sum() for values in (off, exact)])
    return np.array(sums).reshape(-1, 2)


def relative(sums: npt.NDArray[np.float64]) -> float:
    """Returns the relative error of ``output_squares``, the mean over the phases; 0 without phases."""
    return float(np.mean(sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float64).tiny))) if len(sums) else 0.0
