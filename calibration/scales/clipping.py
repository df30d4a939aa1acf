"""The choice of scales: of the rows of a matrix, and of the activations in front of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from export.quantized.quantize import LARGEST, absmax_scale

Floats = npt.NDArray[np.float32]

Error = Callable[[float], float]
"""What it costs to clip activations at a part of the largest magnitude."""

CLIPPINGS = (*np.linspace(1, 0.8, 65).tolist(), 0.7, 0.6)
"""Parts of the largest magnitude of a row that are tried as the largest INT8 number.

Little is clipped at the best of them, but each rounds otherwise, and errors add up differently in the output: on
examples that took no part in the choice, the best of 65 left 0.63 of the error of the first, the best of 17 left 0.81
(text experts of the example checkpoint).
"""

CHANNELS_SHARE = 0.2
"""What channels by themselves weigh beside rows, in the error of a row of weights."""

_CACHED = 1 << 18
"""Numbers of a matrix that are worked on at a time: few enough for a core's cache."""

PERCENTILE = 99.99
"""Of the magnitudes, for the method ``percentile``."""

_BINS, _LEVELS = 2048, 128
"""Bins of the histogram for the method ``entropy``, and levels that INT8 has for a magnitude; as TensorRT had them."""


@dataclass(frozen=True)
class Weighting:
    """What the error of a row of a matrix weighs: e is its quantized row less the exact one, [in].

    Attributes:
        channels: the sum of channels[j] · e[j]² is what the output is off by, in mean square, if channels are
            independent of each other; [in].
        rows: the sum of (e · row)² is the same over a sample of activations, as they hang together; [rows, in].
    """

    channels: npt.NDArray[np.float64]
    rows: Floats


def weight_scale(weight: Floats, weighting: Weighting | None) -> Floats:
    """Scales of the rows of a matrix that leave the least error.

    It is weighed by rows of activations, and a little by channels: a sample may have fewer rows than there are
    channels, and says nothing of the directions that it lacks.

    Args:
        weight: [out, in].
        weighting: of the errors; None for the row's absmax, without a search.

    Returns:
        float32 [out].
    """
    absmax = absmax_scale(weight)
    if weighting is None:
        return absmax
    channels = (CHANNELS_SHARE * weighting.channels).astype(np.float32)
    rows = np.ascontiguousarray(weighting.rows.T)
    step = max(1, _CACHED // weight.shape[1])
    blocks = [slice(start, start + step) for start in range(0, len(weight), step)]
    # A thread a block: most of the work is on single numbers, which numpy gives one core, and its BLAS all of them.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        scales = list(threads.map(lambda block: _best_scale(weight[block], absmax[block], channels, rows), blocks))
    return np.concatenate(scales) if scales else absmax


def _best_scale(weight: Floats, absmax: Floats, channels: Floats, rows: Floats) -> Floats:
    best, least = absmax.copy(), np.full(len(weight), np.inf)
    for part in CLIPPINGS:
        scale = np.maximum(absmax * np.float32(part), np.finfo(np.float32).tiny)
        off = weight / scale[:, None]
        np.rint(off, out=off)
        np.clip(off, -LARGEST, LARGEST, out=off)
        off *= scale[:, None]
        off -= weight
        error = np.square(off @ rows).sum(axis=1)
        error += np.square(off, out=off) @ channels
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
