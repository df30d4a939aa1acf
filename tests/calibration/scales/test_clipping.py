"""Scales against searches written out plainly, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.scales.clipping import (
    CHANNELS_SHARE,
    CLIPPINGS,
    PERCENTILE,
    Weighting,
    activation_scale,
    fake_quantized,
    weight_scale,
)
from export.quantized.quantize import absmax_scale, quantize


def error_of(weight: np.ndarray, scale: float, weighting: Weighting) -> float:
    """Of one row, in float64."""
    steps = np.clip(np.rint(weight / np.float32(scale)), -127, 127).astype(np.float64)
    off = steps * np.float64(np.float32(scale)) - weight
    together = sum(float(off @ row) ** 2 for row in weighting.rows.astype(np.float64))
    return CHANNELS_SHARE * float(weighting.channels @ off**2) + together


@pytest.mark.parametrize("tails", [3, 30])
def test_weight_scales_against_brute_force(tails: int) -> None:
    generator = np.random.default_rng(tails)
    weight = generator.standard_t(tails, size=(40, 96)).astype(np.float32)
    rows = (generator.normal(size=(20, 96)) + 0.3).astype(np.float32)
    weighting = Weighting(np.exp(generator.normal(size=96) * 2), rows)
    scales = weight_scale(weight, weighting)
    for row, scale in zip(weight, scales, strict=True):
        absmax = np.abs(row).max()
        least = min(error_of(row, absmax * part / 127, weighting) for part in CLIPPINGS)
        assert error_of(row, scale, weighting) <= least * (1 + 1e-3)
    unclipped = sum(error_of(r, s, weighting) for r, s in zip(weight, absmax_scale(weight), strict=True))
    chosen = sum(error_of(r, s, weighting) for r, s in zip(weight, scales, strict=True))
    assert chosen < unclipped


def test_weights_are_clipped_where_channels_do_not_matter() -> None:
    weight = np.full((1, 8), 0.5, np.float32)
    weight[0, 0] = 0.9
    weight[0, 1:4] = [0.33, 0.21, 0.117]
    weighting = Weighting(np.array([1e-9, *[1.0] * 7]), np.empty((0, 8), np.float32))
    clipped = weight_scale(weight, weighting)
    assert clipped[0] < absmax_scale(weight)[0]
    assert quantize(weight, clipped)[0, 0] == 127
    np.testing.assert_array_equal(weight_scale(weight, None), absmax_scale(weight))


def test_rows_of_zeros_have_a_scale() -> None:
    scales = weight_scale(np.zeros((3, 8), np.float32), Weighting(np.ones(8), np.ones((2, 8), np.float32)))
    assert (scales > 0).all()


def no_error(part: float) -> float:
    raise AssertionError("only the method mse asks")


def test_simple_methods() -> None:
    sample = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    assert activation_scale(sample, 9.0, "absmax", no_error) == np.float32(9 / 127)
    expected = np.percentile(np.abs(sample.astype(np.float64)), PERCENTILE) / 127
    assert activation_scale(sample, 9.0, "percentile", no_error) == pytest.approx(expected, rel=1e-6)
    assert activation_scale(sample, 0.0, "mse", no_error) == 1.0
    assert activation_scale(sample[:0], 2.0, "entropy", no_error) == np.float32(2 / 127)


def test_least_error_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    sample = generator.standard_t(4, size=(400, 100)).astype(np.float32)
    absmax = float(np.abs(sample).max())

    def error(part: float) -> float:
        return float(np.square(fake_quantized(sample, part * absmax / 127) - sample, dtype=np.float64).sum())

    chosen = activation_scale(sample, absmax, "mse", error) * 127 / absmax
    assert error(chosen) <= 1.01 * min(error(part) for part in np.linspace(0.02, 2, 500))
    assert 0.5 < chosen < 1


def test_headroom_where_other_data_needs_it() -> None:
    sample = np.ones((10, 10), np.float32)
    assert activation_scale(sample, 2.0, "mse", lambda part: abs(part - 1.4)) == pytest.approx(2 * 1.4 / 127, rel=0.02)


def plain_entropy(magnitudes: np.ndarray, absmax: float) -> float:
    """The calibrator of TensorRT as NVIDIA published it (GTC 2017, "8-bit inference with TensorRT"), zeros left out."""
    counts, edges = np.histogram(magnitudes[magnitudes > 0], bins=2048, range=(0, absmax))
    best, least = absmax, np.inf
    for stop in range(128, 2049, 8):
        reference = counts[:stop].astype(np.float64)
        reference[-1] += counts[stop:].sum()
        candidate = np.zeros(stop)
        for level in range(128):
            inside = [bin for bin in range(stop) if bin * 128 // stop == level]
            filled = [bin for bin in inside if counts[bin]]
            for bin in filled:
                candidate[bin] = counts[inside].sum() / len(filled)
        if (reference[candidate == 0] > 0).any():
            continue
        p, q = reference / reference.sum(), candidate / candidate.sum()
        divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        if divergence < least:
            best, least = edges[stop], divergence
    return float(best)


def test_entropy_against_the_published_method() -> None:
    sample = np.random.default_rng(0).laplace(size=(60, 100)).astype(np.float32)
    sample[0, 0] = 25
    expected = plain_entropy(np.abs(sample).ravel(), 25.0)
    assert activation_scale(sample, 25.0, "entropy", no_error) == pytest.approx(expected / 127, rel=1e-6)
    assert expected < 20


def test_activations_are_rounded_as_the_kernels_do() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, 127.4, 500, -127.6, -128.6, -500], np.float32)
    np.testing.assert_array_equal(fake_quantized(values, 1.0), [0, 2, 2, 0, 127, 127, -128, -128, -128])
