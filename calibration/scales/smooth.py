"""Smoothing: outliers of activations moved into the weights, x / s and W · s, with s chosen on the data.

The factors follow SmoothQuant (arXiv 2211.10438): channel j gets s_j = max|x_j|^a / max|W_j|^(1 - a), with the
exponent a that leaves the least error, layer by layer; no smoothing is among the choices. Where a factor goes into a
matrix that is not quantized, it is a power of two, which changes no bit of it in any number format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.observed.statistics import Observed
from calibration.scales.clipping import Weighting, activation_scale, fake_quantized
from export.quantized.quantize import LARGEST, absmax_scale, quantize

Floats = npt.NDArray[np.float32]

EXPONENTS = tuple(np.linspace(0, 1, 11).round(2).tolist())

SEARCH_ROWS, SEARCH_SAMPLE = 256, 64
"""Rows of a matrix, evenly spread, and rows of activations of each phase that the search computes with."""

WEIGHTING_ROWS = 128
"""Rows of activations of each phase that scales of weights are searched with."""

PAYS = 0.8
"""Smoothing is taken where it leaves less than this part of the error: what gains less is as likely to do harm."""

_LARGEST_POWER = 20
"""Factors stay within 2**-20 … 2**20, far from where a norm's weight would over- or underflow."""


@dataclass(frozen=True)
class Candidate:
    """A matrix that a factor would go into, as far as the search needs it.

    Attributes:
        weight: some rows of it, evenly spread, [rows, in].
        largest: largest magnitude of each column of the whole matrix, [in].
        observed: the activations in front of it.
        halves: the same, of each half of the examples.
    """

    weight: Floats
    largest: Floats
    observed: Observed
    halves: tuple[Observed, ...]

    @property
    def tries(self) -> list[tuple[int | None, Observed, Observed]]:
        """What to choose with and what to try it on, and the number of the first: each half and the other.

        Where a half is empty, both are the whole, and the number is None.
        """
        if not all(half.rows for half in self.halves):
            return [(None, self.observed, self.observed)]
        return [(index, half, self.halves[1 - index]) for index, half in enumerate(self.halves)]


@dataclass(frozen=True)
class Smoothed:
    """How the activations in front of a matrix are smoothed.

    Attributes:
        exponent: None for not at all.
        factor: [in]; None for not at all.
        halves: what the factor would be with each half of the examples.
    """

    exponent: float | None = None
    factor: Floats | None = None
    halves: tuple[Floats, ...] = ()

    def over(self, channels: int, half: int | None = None) -> Floats:
        """The factors, of all examples or of one half; 1 for no smoothing."""
        factor = self.halves[half] if half is not None and self.halves else self.factor
        return np.ones(channels, np.float32) if factor is None else factor


@dataclass(frozen=True)
class Rule:
    """How a matrix will be quantized.

    Attributes:
        clipping: search the weights' scales for the least error, rather than take the absmax of each row.
        activations: method of ``calibration.scales.clipping.METHODS``; None where activations are not quantized.
    """

    clipping: bool
    activations: str | None


def factors(absmax: Floats, largest: Floats, exponent: float, powers: bool) -> Floats:
    """The factors of one exponent, [in]; 1 for channels without activations or weights.

    Args:
        absmax: largest magnitude of each channel, [in].
        largest: the same of each column of the weights, [in].
        exponent: 0 … 1.
        powers: whether they are powers of two.
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
    """Smoothing of matrices with common activations; arguments as those of ``factors``."""
    largest = np.maximum.reduce([item.largest for item in candidates])

    def over(observed: Sequence[Observed]) -> Floats:
        return factors(np.maximum.reduce([item.absmax for item in observed]), largest, exponent, powers)

    halves = zip(*(item.halves for item in candidates), strict=True)
    return Smoothed(exponent, over([item.observed for item in candidates]), tuple(map(over, halves)))


def search(candidates: Sequence[Candidate], rule: Rule, exponents: Sequence[float], powers: bool) -> Smoothed:
    """The smoothing with the least error over some matrices with common activations; none unless it pays.

    What one half of the examples gives is tried on the other half. Channels that one half hardly uses would otherwise
    be smoothed to the brim, and saturate with other questions.

    Args:
        candidates: the matrices: that of one expert, or gate and up of both.
        rule: how they will be quantized.
        exponents: to choose from; the only one is taken even where it does harm.
        powers: whether factors are powers of two.
    """
    seen = [item for item in candidates if item.observed.rows]
    choices = [smoothed(seen, exponent, powers) for exponent in exponents] if seen else []
    if len(choices) <= 1:
        return choices[0] if choices else Smoothed()
    none, *errors = (float(np.mean([_error(item, choice, rule) for item in seen])) for choice in [Smoothed(), *choices])
    best = int(np.argmin(errors))
    return choices[best] if errors[best] < PAYS * none else Smoothed()


def _error(matrix: Candidate, choice: Smoothed, rule: Rule) -> float:
    """The relative error of a matrix's output that smoothing and quantizing leave.

    Nothing is clipped here: what clipping gains is much the same with every exponent.
    """
    errors = []
    for half, seen, other in matrix.tries:
        factor = choice.over(matrix.weight.shape[1], half)
        weight = matrix.weight * factor
        scale = absmax_scale(weight)
        activations = _scale(seen, factor) if rule.activations else None
        quantized = quantize(weight, scale) * scale[:, None]
        errors.append(relative(output_squares(matrix.weight, quantized, other, factor, activations, SEARCH_SAMPLE)))
    return float(np.mean(errors))


def _scale(observed: Observed, factor: Floats) -> float:
    """With which the largest of smoothed activations becomes ``LARGEST``."""
    return max(float((observed.absmax / factor).max()), 1e-30) / LARGEST


def weighting(observed: Observed, factor: Floats, rule: Rule) -> Weighting | None:
    """What errors in the smoothed weights weigh; None where the weights' scales are not searched."""
    if not rule.clipping:
        return None
    rows = observed.weighted_rows(WEIGHTING_ROWS) / factor
    return Weighting(observed.importance / factor.astype(np.float64) ** 2, rows)


def input_scale(matrix: Candidate, choice: Smoothed, rule: Rule) -> float | None:
    """The scale of smoothed activations; None where they are not quantized."""
    if rule.activations is None:
        return None
    channels = matrix.weight.shape[1]

    def error(part: float) -> float:
        errors = []
        for half, seen, other in matrix.tries:
            factor = choice.over(channels, half)
            weight, scale = matrix.weight * factor, part * _scale(seen, factor)
            errors.append(relative(output_squares(matrix.weight, weight, other, factor, scale, SEARCH_SAMPLE)))
        return float(np.mean(errors))

    factor = choice.over(channels)
    sample = np.concatenate([matrix.observed.prompt.sample, matrix.observed.generated.sample])
    largest = float((matrix.observed.absmax / factor).max())
    return activation_scale(np.divide(sample, factor, dtype=np.float32), largest, rule.activations, error)


def output_squares(
    weight: Floats, quantized: Floats, observed: Observed, factor: Floats, scale: float | None, rows: int
) -> npt.NDArray[np.float64]:
    """Of each phase, over its sampled rows x: ‖quantized · x/s - weight · x‖², and ‖weight · x‖²; [phases, 2]."""
    sums = []
    for phase in observed.phases:
        exact = phase.sample[:rows] @ weight.T
        given = phase.sample[:rows] / factor
        given = fake_quantized(given, scale) if scale is not None else given
        off = given @ quantized.T - exact
        sums.append([np.square(values, dtype=np.float64).sum() for values in (off, exact)])
    return np.array(sums).reshape(-1, 2)


def relative(sums: npt.NDArray[np.float64]) -> float:
    """The error of ``output_squares``, as part of the whole, mean over the phases; 0 without any."""
    return float(np.mean(sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float64).tiny))) if len(sums) else 0.0
