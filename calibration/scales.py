"""The choice of scales: of the rows of a matrix, and of the activations in front of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from calibration.quantize import LARGEST, absmax_scale

Floats = npt.NDArray[np.float32]

Error = Callable[[float], float]
"""What it costs to clip activations at a part of the largest magnitude."""

CLIPPINGS = tuple(np.linspace(1, 0.6, 17).tolist())
"""Parts of the largest magnitude of a row that are tried as the largest INT8 number."""

PERCENTILE = 99.99
"""Of the magnitudes, for the method ``percentile``."""

_BINS, _LEVELS = 2048, 128
"""Bins of the histogram for the method ``entropy``, and levels that INT8 has for a magnitude; as TensorRT had them."""


def weight_scale(weight: Floats, importance: npt.NDArray[np.float64] | None) -> Floats:
    """Scales of the rows of a matrix that leave the least error.

    The error of a row is the sum over its columns j of importance[j] · (w[j] - scale · int8[j])²: what the output of
    the row is off by, in mean square, if channels are independent of each other.

    Args:
        weight: [out, in].
        importance: mean squares of the channels, [in]; None for the row's absmax, without a search.

    Returns:
        float32 [out].
    """
    absmax = absmax_scale(weight)
    if importance is None:
        return absmax
    best, least = absmax.copy(), np.full(len(weight), np.inf)
    weights = importance.astype(np.float32)
    for part in CLIPPINGS:
        scale = np.maximum(absmax * np.float32(part), np.finfo(np.float32).tiny)
        steps = np.rint(weight / scale[:, None])
        np.clip(steps, -LARGEST, LARGEST, out=steps)
        steps *= scale[:, None]
        steps -= weight
        np.square(steps, out=steps)
        error = steps @ weights
        better = error < least
        best[better], least[better] = scale[better], error[better]
    return best


def fake_quantized(values: Floats, scale: float) -> Floats:
    """What INT8 leaves of activations: rounded to multiples of ``scale``, ties to even, from -128 to 127 of them."""
    steps = np.rint(values / np.float32(scale))
    return np.asarray(np.clip(steps, -LARGEST - 1, LARGEST) * np.float32(scale), np.float32)


def activation_scale(sample: Floats, absmax: float, method: str, error: Error) -> float:
    """The one scale of all activations in front of a matrix.

    Args:
        sample: some of them, of any shape.
        absmax: the largest magnitude of all, those not in the sample included.
        method: one of ``METHODS``.
        error: what it costs to clip at a part of the largest magnitude; the method ``mse`` asks it.
    """
    if absmax == 0:
        return 1.0
    threshold = METHODS[method](np.abs(sample).ravel(), absmax, error) if sample.size else absmax
    return float(np.float32(max(threshold, absmax * 1e-6) / LARGEST))


def _absmax(magnitudes: Floats, absmax: float, error: Error) -> float:
    return absmax


def _percentile(magnitudes: Floats, absmax: float, error: Error) -> float:
    return float(np.percentile(magnitudes, PERCENTILE))


def _mse(magnitudes: Floats, absmax: float, error: Error) -> float:
    """Found in two rounds, to 1/32 of an octave; up to twice the largest, which other data may exceed."""

    def best(parts: npt.NDArray[np.float64]) -> float:
        return float(parts[int(np.argmin([error(part) for part in parts.tolist()]))])

    coarse = best(np.exp2(np.arange(4, -17, -1) / 4))
    return absmax * best(coarse * np.exp2(np.arange(-7, 8) / 32))


def _entropy(magnitudes: Floats, absmax: float, error: Error) -> float:
    """The threshold whose INT8 histogram diverges least from the clipped one (KL), as TensorRT's calibrator chose it.

    Zeros are left out: they are exact at every scale, and with them one bin would decide.
    """
    counts, edges = np.histogram(magnitudes[magnitudes > 0], bins=_BINS, range=(0, absmax))
    if not counts.any():
        return absmax
    tails = counts[::-1].cumsum()[::-1]
    stops = range(_LEVELS, _BINS + 1, 8)
    divergences = [_divergence(counts[:stop], int(tails[stop]) if stop < _BINS else 0) for stop in stops]
    return float(edges[stops[int(np.argmin(divergences))]])


def _divergence(counts: npt.NDArray[np.int64], beyond: int) -> float:
    """KL of a histogram whose last bin takes what is beyond it, from the same in ``_LEVELS`` levels."""
    if not counts.any():
        return np.inf
    clipped = counts.astype(np.float64)
    clipped[-1] += beyond
    level = np.arange(len(counts)) * _LEVELS // len(counts)
    filled = counts > 0
    in_level = np.bincount(level, counts, _LEVELS)
    bins_in_level = np.bincount(level, filled, _LEVELS)
    spread = np.where(filled, in_level[level] / np.maximum(bins_in_level[level], 1), 0)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    if ((p > 0) & (q == 0)).any():
        return np.inf
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


METHODS: dict[str, Callable[[Floats, float, Error], float]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
"""Where activations are clipped: at the largest magnitude, at a percentile of them, where the histogram of INT8 numbers
diverges least from theirs (KL), or where the output of the matrix is off by least in mean square.
"""
