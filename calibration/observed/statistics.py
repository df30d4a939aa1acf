"""Streaming statistics of the activations in front of a matrix, in bounded memory.

Sums and extremes are kept for each channel, and a sample of whole rows. The sample is for percentiles, histograms and
the errors of smoothed activations, whose factors are found only afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]

PHASES = ("prompt", "generated")
"""Rows of the prompt, and rows of generated tokens. Each phase has statistics of its own."""

SAMPLED_VALUES, SAMPLED_ROWS = 1 << 19, 512
"""The most values and the most rows of a sample. With the 2B model: 256 rows of 2048 channels, 64 rows of 8192, and
0.4 GB for the text experts of all layers, both phases and both halves of the examples."""

HALVES = 2
"""Examples go into two halves in turn: what is chosen with one half is tried on the other."""


def sampled_rows(channels: int) -> int:
    """Returns how many rows of that many channels a sample keeps."""
    return max(1, min(SAMPLED_ROWS, SAMPLED_VALUES // channels))


class Statistics:
    """Streaming statistics of rows [n, channels] of one phase.

    Each row has a random number, its priority, which depends only on its place in the data. The sample keeps the rows
    of the smallest priorities, so that each row is as likely as any other to be in it.

    Attributes:
        channels: length of a row.
        rows: how many rows have been seen.
        low, high: smallest and largest value of each channel, [channels]; 0 before any row.
        squares: sum of squares of each channel, float64 [channels].
        sample: the rows kept, [at most sampled_rows(channels), channels].
        priorities: those of the sample's rows, uint64, ascending.
    """

    def __init__(self, channels: int, rows: int = 0) -> None:
        self.channels, self.rows = channels, rows
        self.low, self.high = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        self.squares = np.zeros(channels)
        self.sample = np.empty((0, channels), np.float32)
        self.priorities = np.empty(0, np.uint64)

    def update(self, rows: npt.NDArray[np.floating], priorities: npt.NDArray[np.uint64]) -> bool:
        """Adds rows [n, channels] with their priorities [n]; if a value is not finite, adds none and returns False."""
        if not len(rows):
            return True
        rows = rows.astype(np.float32, copy=False)
        new = Statistics(self.channels, len(rows))
        new.low, new.high = rows.min(axis=0), rows.max(axis=0)
        if not (np.isfinite(new.low).all() and np.isfinite(new.high).all()):
            return False
        new.squares = np.einsum("rc,rc->c", rows, rows, dtype=np.float64)
        room = sampled_rows(self.channels)
        better = priorities < self.priorities[-1] if len(self.sample) == room else slice(None)
        new.sample, new.priorities = rows[better], priorities[better]
        self.join(new, room)
        return True

    def join(self, other: Statistics, room: int | None = None) -> None:
        """Adds what ``other`` saw. The joined sample keeps at most ``room`` rows; None keeps all."""
        if not other.rows:
            return
        self.low = np.minimum(self.low, other.low) if self.rows else other.low
        self.high = np.maximum(self.high, other.high) if self.rows else other.high
        self.squares = self.squares + other.squares
        self.rows += other.rows
        if len(other.sample):
            joined = np.concatenate([self.priorities, other.priorities])
            order = np.argsort(joined, kind="stable")[:room]
            self.priorities = joined[order]
            self.sample = np.concatenate([self.sample, other.sample])[order]

    @property
    def absmax(self) -> Rows:
        """Largest absolute value of each channel, [channels]."""
        return np.maximum(-self.low, self.high)

    @property
    def mean_square(self) -> npt.NDArray[np.float64]:
        """Mean square of each channel, [channels]; 0 before any row."""
        return self.squares / max(self.rows, 1)


@dataclass
class Observed:
    """Statistics of both phases in front of one matrix."""

    prompt: Statistics
    generated: Statistics

    @property
    def phases(self) -> list[Statistics]:
        """Those phases that have rows."""
        return [phase for phase in (self.prompt, self.generated) if phase.rows]

    @property
    def rows(self) -> int:
        """Rows seen in both phases."""
        return self.prompt.rows + self.generated.rows

    @property
    def absmax(self) -> Rows:
        """Largest absolute value of each channel, [channels]."""
        return np.maximum(self.prompt.absmax, self.generated.absmax)

    @property
    def importance(self) -> npt.NDArray[np.float64]:
        """Weights of the errors in the columns of the matrix, [channels]; 1 on average, or 1 everywhere without rows.

        It is the mean square of a channel, divided by that of all channels of the phase, and the mean over both phases.
        So both phases count equally, although a prompt has many more rows, and its first row may be larger than all
        others together.
        """
        shares = [phase.mean_square / phase.mean_square.mean() for phase in self.phases if phase.squares.any()]
        return np.mean(shares, axis=0) if shares else np.ones(self.prompt.channels)

    def weighted_rows(self, most: int) -> Rows:
        """Returns rows of the samples, at most ``most`` of each phase, scaled: [rows, channels].

        The sum of squares of a channel estimates its ``importance``.
        """
        phases = [phase for phase in self.phases if phase.squares.any()]
        rows = [np.empty((0, self.prompt.channels), np.float32)]
        for phase in phases:
            sample = phase.sample[:most]
            rows.append(sample / np.float32(np.sqrt(len(phases) * len(sample) * phase.mean_square.mean())))
        return np.concatenate(rows)


def outliers(largest: Rows) -> float | None:
    """Returns the largest magnitude of a channel, divided by the median channel's; None where the latter is 0."""
    middle = float(np.median(largest))
    return float(largest.max()) / middle if middle else None


def nothing(channels: int) -> tuple[Observed, ...]:
    """Makes both halves, without rows."""
    return tuple(Observed(Statistics(channels), Statistics(channels)) for _ in range(HALVES))


def merged(halves: Sequence[Observed]) -> Observed:
    """Joins both halves, samples included."""
    whole, _ = nothing(halves[0].prompt.channels)
    for half in halves:
        whole.prompt.join(half.prompt)
        whole.generated.join(half.generated)
    return whole


def priorities(seed: int, example: int, phase: int, piece: int, rows: int) -> npt.NDArray[np.uint64]:
    """Returns random numbers for the rows of one run of the decoder, the same in every calibration."""
    return np.random.default_rng([seed, example, phase, piece]).integers(0, 1 << 63, rows, dtype=np.uint64)
