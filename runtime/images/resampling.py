"""Pillow's bicubic filter as integers, for code that resizes pictures in its place.

Source: ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow's ``Resample.c``. Weights are of 22 bits; sums are
rounded and clipped to 8 bits after each direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL

WEIGHT_BITS = 22
_SUPPORT = 2.0
_A = -0.5


@dataclass(frozen=True)
class Filter:
    """The weights of one direction.

    Attributes:
        first: int32 [places], the first source pixel of each pixel of the result.
        count: int32 [places], how many source pixels it is made of.
        weights: int32 [places, taps], in steps of 2⁻²²; those from ``count`` on are 0.
    """

    first: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int32]


def bicubic(source: int, target: int) -> Filter:
    """Returns the weights that resize ``source`` pixels to ``target``; the same bits as Pillow's."""
    scale = source / target
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    centers = (np.arange(target) + 0.5) * scale
    # Truncated like a cast in C; nothing here is far enough below 0 for that to differ from rounding down.
    first = np.maximum((centers - support + 0.5).astype(np.int32), 0)
    count = np.minimum((centers + support + 0.5).astype(np.int32), source) - first
    weights = np.zeros((target, math.ceil(support) * 2 + 1))
    total = np.zeros(target)
    for tap in range(weights.shape[1]):
        values = _cubic((tap + first - centers + 0.5) * (1.0 / stretch))
        weights[:, tap] = np.where(tap < count, values, 0.0)
        # One by one, since the sum rounds in that order.
        total += weights[:, tap]
    weights /= np.where(total == 0.0, 1.0, total)[:, None]
    return Filter(first, count, np.trunc(weights * (1 << WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int32))


def across_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Returns whether the installed Pillow resizes across before down; sizes are (width, height).

    Up to Pillow 12 it always does. From 13 on it resizes down first where that removes more than twice as many pixels
    as across. The order shows in the last bits.
    """
    if int(PIL.__version__.split(".", maxsplit=1)[0]) < 13:
        return True
    narrower, lower = (before - after for before, after in zip(source, target, strict=True))
    return not (lower > 0 and lower > 2 * narrower)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.abs(x)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
