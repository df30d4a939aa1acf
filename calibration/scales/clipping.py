"""The choice of scales, by clipping: those of the rows of a matrix, and that of the activations in front of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from export.quantized.quantize import LARGEST, Floats, absmax_scale

Error = Callable[[float], float]
"""The error of clipping activations at a fraction of the largest magnitude."""

CLIPPINGS = (*np.linspace(1, 0.8, 65).tolist(), 0.7, 0.6)
"""Fractions of the largest magnitude of a row that are tried as the largest INT8 number.

The best of them clips little, but each rounds differently. On examples that were not used for the choice, the best of
65 left 0.63 of the error of the first, and the best of 17 left 0.81 (text experts of the example checkpoint).
"""

CHANNELS_SHARE = 0.2
"""The weight of the error by channels, added to that by rows; see ``Weighting``."""

_CACHED = 1 << 18
"""How many weights are searched at a time: they fit into a core's cache."""

PERCENTILE = 99.99
"""The percentile of the magnitudes at which the method ``percentile`` clips."""

_BINS, _LEVELS = 2048, 128
"""Bins of the histogram of the method ``entropy``, and INT8's levels of magnitude; both are TensorRT's."""


@dataclass(frozen=True)
class Weighting:
    """Weights of the error e of a row of a matrix, the quantized row minus the exact one, [in].

    Attributes:
        channels: [in]. The sum of channels[j] · e[j]² is the mean squared error of the output if channels are
            independent of each other.
        rows: [rows, in]. The sum of (e · row)² is the mean squared error of the output on a sample of activations.
    """

    channels: npt.NDArray[np.float64]
    rows: Floats


def weight_scale(weight: Floats, weighting: Weighting | None) -> Floats:
    """Finds the scales of the rows of a matrix that leave the least error.

    Errors are weighted by sampled rows, and a little by channels: a sample may have fewer rows than there are channels,
    and then leaves some directions out.

    Args:
        weight: [out, in].
        weighting: of the errors; None for scales from the absmax of each row, without a search.

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
    # One thread for each block. Most of the work is elementwise, for which numpy uses one core; its BLAS uses all.
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
    """Rounds activations to multiples of ``scale``, -128 to 127 of them, with ties to even."""
    steps = np.rint(values / np.float32(scale))
    return np.asarray(np.clip(steps, -LARGEST - 1, LARGEST) * np.float32(scale), np.float32)


def activation_scale(sample: Floats, absmax: float, method: str, error: Error) -> float:
    """Chooses the scale of the activations in front of a matrix.

    Args:
        sample: some of the activations, of any shape.
        absmax: the largest magnitude of all activations.
        method: one of ``METHODS``.
        error: the error of clipping at a fraction of ``absmax``, for the method ``mse``.
    """
    if absmax == 0:
        return 1.0
    threshold = METHODS[method](np.abs(sample).ravel(), absmax, error) if sample.size else absmax
    return float(np.float32(max(threshold, absmax * 1e-6) / LARGEST))


def _mse(magnitudes: Floats, absmax: float, error: Error) -> float:
    """Searches in two rounds, to 1/32 of an octave, and up to twice the absmax: other data may exceed it."""

    def best(parts: npt.NDArray[np.float64]) -> float:
        return float(parts[int(np.argmin([error(part) for part in parts.tolist()]))])

    coarse = best(np.exp2(np.arange(4, -17, -1) / 4))
    return absmax * best(coarse * np.exp2(np.arange(-7, 8) / 32))


def _entropy(magnitudes: Floats, absmax: float, error: Error) -> float:
    """Finds the threshold whose INT8 histogram has the least KL divergence from the clipped one, as TensorRT did.

    Zeros are left out. They are exact at every scale, and their bin would outweigh all others.
    """
    counts, edges = np.histogram(magnitudes[magnitudes > 0], bins=_BINS, range=(0, absmax))
    if not counts.any():
        return absmax
    tails = counts[::-1].cumsum()[::-1]
    stops = range(_LEVELS, _BINS + 1, 8)
    divergences = [_divergence(counts[:stop], int(tails[stop]) if stop < _BINS else 0) for stop in stops]
    return float(edges[stops[int(np.argmin(divergences))]])


def _divergence(counts: npt.NDArray[np.int64], beyond: int) -> float:
    """Returns the KL divergence between a clipped histogram, with ``beyond`` in its last bin, and its INT8 form."""
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
    "absmax": lambda magnitudes, absmax, error: absmax,
    "percentile": lambda magnitudes, absmax, error: float(np.percentile(magnitudes, PERCENTILE)),
    "entropy": _entropy,
    "mse": _mse,
}
"""Where activations are clipped: at the largest magnitude, at a percentile, where the INT8 histogram has the least KL
divergence, or where the mean squared error of the matrix's output is least.
"""
