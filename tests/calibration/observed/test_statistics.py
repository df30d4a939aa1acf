"""Streaming statistics against the same of all rows gathered."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.observed.statistics import SAMPLED_ROWS, Statistics, merged, nothing, priorities, sampled_rows


def stream(rows: np.ndarray, drawn: np.ndarray, cuts: list[int]) -> Statistics:
    statistics = Statistics(rows.shape[1])
    for piece, numbers in zip(np.split(rows, cuts), np.split(drawn, cuts), strict=True):
        assert statistics.update(piece, numbers)
    return statistics


@pytest.mark.parametrize("cuts", [[], [1], [0, 7, 7, 1500], list(range(1, 3000, 13))])
def test_against_all_rows(cuts: list[int]) -> None:
    generator = np.random.default_rng(1)
    rows = (generator.normal(size=(3000, 24)) * np.exp2(generator.integers(-6, 6, 24))).astype(np.float32)
    drawn = priorities(0, 0, 0, 0, len(rows))
    statistics = stream(rows, drawn, cuts)
    assert statistics.rows == 3000
    np.testing.assert_array_equal(statistics.low, rows.min(axis=0))
    np.testing.assert_array_equal(statistics.high, rows.max(axis=0))
    np.testing.assert_array_equal(statistics.absmax, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(statistics.mean_square, np.square(rows.astype(np.float64)).mean(axis=0), rtol=1e-12)
    # The sample is those rows whose priorities are smallest, however they came.
    smallest = np.argsort(drawn)[:SAMPLED_ROWS]
    np.testing.assert_array_equal(statistics.sample, rows[smallest])


def test_the_sample_is_drawn_evenly() -> None:
    rows = np.arange(20000, dtype=np.float32)[:, None]
    pieces = [priorities(0, example, 0, 0, 100) for example in range(200)]
    sample = stream(rows, np.concatenate(pieces), list(range(100, 20000, 100))).sample.ravel()
    counts = np.histogram(sample, bins=10, range=(0, 20000))[0]
    assert len(np.unique(sample)) == SAMPLED_ROWS
    assert counts.min() > 17  # 51 expected; five standard deviations
    assert counts.max() < 85


def test_memory_is_bounded() -> None:
    assert sampled_rows(2048) == 256
    assert sampled_rows(8192) == 64
    assert sampled_rows(10**9) == 1


def test_half_precision_is_counted_in_float32() -> None:
    rows = np.full((500, 2), 200, np.float16)
    statistics = stream(rows, priorities(0, 0, 0, 0, 500), [])
    np.testing.assert_array_equal(statistics.squares, 500 * 200.0**2)
    assert statistics.sample.dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_taken(value: float) -> None:
    statistics = Statistics(3)
    rows = np.ones((4, 3), np.float32)
    assert statistics.update(rows, priorities(0, 0, 0, 0, 4))
    rows[2, 1] = value
    assert not statistics.update(rows, priorities(0, 0, 0, 1, 4))
    assert statistics.rows == 4


def test_both_phases_count_equally() -> None:
    """However many rows a prompt has, and however large they are."""
    observed, empty = nothing(2)
    observed.prompt.update(np.tile(np.array([[300, 0]], np.float32), (1000, 1)), priorities(0, 0, 0, 0, 1000))
    observed.generated.update(np.array([[0, 1]], np.float32), priorities(0, 0, 1, 0, 1))
    np.testing.assert_allclose(observed.importance, [1, 1])
    np.testing.assert_allclose(np.square(observed.weighted_rows(2000)).sum(axis=0), [1, 1], rtol=1e-5)
    assert observed.weighted_rows(3).shape == (4, 2)
    assert observed.rows == 1001
    np.testing.assert_array_equal(observed.absmax, [300, 1])
    np.testing.assert_array_equal(empty.importance, [1, 1])


def test_both_halves_together() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    first, second = nothing(5)
    first.prompt.update(rows[:100], priorities(0, 0, 0, 0, 100))
    second.prompt.update(rows[100:], priorities(0, 1, 0, 0, 200))
    second.generated.update(rows[:7], priorities(0, 1, 1, 0, 7))
    whole = merged((first, second))
    np.testing.assert_array_equal(whole.prompt.low, rows.min(axis=0))
    np.testing.assert_array_equal(whole.prompt.high, rows.max(axis=0))
    np.testing.assert_allclose(whole.prompt.mean_square, np.square(rows.astype(np.float64)).mean(axis=0))
    assert (whole.prompt.rows, whole.generated.rows) == (300, 7)
    assert sorted(map(tuple, whole.prompt.sample)) == sorted(map(tuple, rows))
