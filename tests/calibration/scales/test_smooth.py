"""Smoothing: nothing changes by it, and it is chosen where it helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.data import read_examples
from calibration.observed.statistics import merged, nothing, priorities
from calibration.scales.choose import EXPONENTS
from calibration.scales.smooth import Candidate, factors, search
from export.quantized.plan import Smoothing
from export.quantized.weights import DecoderWeights
from runtime.backends.graph import GraphInMemory
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.model import Model, load


def candidate(channels: int = 64, outlier: float = 1.0, rows: int = 300, seed: int = 0) -> Candidate:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(48, channels)).astype(np.float32)
    activations = generator.normal(size=(rows, channels)).astype(np.float32)
    activations[:, 5] *= outlier
    halves = nothing(channels)
    for index, (half, part) in enumerate(zip(halves, np.array_split(activations, 2), strict=True)):
        half.prompt.update(part, priorities(0, index, 0, 0, len(part)))
    return Candidate(weight, np.abs(weight).max(axis=0), merged(halves), halves)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
def test_factors_follow_the_paper(exponent: float) -> None:
    """SmoothQuant's formula, but for one factor that all channels share, which changes nothing."""
    item = candidate(outlier=50)
    absmax, largest = item.observed.absmax, item.largest
    factor = factors(absmax, largest, exponent, powers=False)
    ratio = factor / (absmax**exponent / largest ** (1 - exponent))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    powers = factors(absmax, largest, exponent, powers=True)
    np.testing.assert_array_equal(np.log2(powers), np.rint(np.log2(powers)))
    assert np.abs(np.log2(powers / factor)).max() <= 0.5 + 1e-5


def test_channels_that_are_never_used_stay() -> None:
    item = candidate()
    absmax, largest = item.observed.absmax.copy(), item.largest.copy()
    absmax[3], largest[4] = 0, 0
    for powers in (True, False):
        factor = factors(absmax, largest, 0.5, powers)
        assert factor[3] == factor[4] == 1
        assert np.isfinite(factor).all()


def test_outliers_are_smoothed_where_activations_are_quantized() -> None:
    assert search([candidate(outlier=200)], True, EXPONENTS, powers=False).exponent is not None
    chosen = search([candidate(outlier=200)], True, EXPONENTS, powers=True)
    assert chosen.factor is not None
    assert chosen.factor[5] > 8 * np.median(chosen.factor)
    assert search([candidate(outlier=200)], True, (), powers=True).factor is None
    assert search([candidate()], True, (0.7,), powers=True).exponent == 0.7


def smoothing(bundle: Bundle, powers: bool, visual: bool) -> list[Smoothing]:
    """Factors over six octaves, for every layer."""
    model, generator = bundle.manifest.model, np.random.default_rng(7)

    def random(size: int) -> np.ndarray:
        logarithms = generator.uniform(-3, 3, size)
        return np.exp2(np.rint(logarithms) if powers else logarithms).astype(np.float32)

    return [
        Smoothing(
            layer,
            random(model.hidden_size),
            random(model.intermediate_size),
            random(model.intermediate_size) if visual else None,
        )
        for layer in range(model.num_hidden_layers)
    ]


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("visual", [True, False])
def test_answers_of_the_float_model_do_not_change(tiny_bundle: Path, pairs: Path, powers: bool, visual: bool) -> None:
    """With powers of two not by a bit."""
    bundle = Bundle(tiny_bundle)
    weights = DecoderWeights(bundle).smoothed(smoothing(bundle, powers, visual))
    names = [tensor.name for tensor in weights.model.graph.initializer if weights.is_smoothed(tensor.name)]
    assert len(names) == bundle.manifest.model.num_hidden_layers * (5 if visual else 4)
    arrays = {name: np.concatenate(list(weights.blocks(name))).reshape(weights.shape(name)) for name in names}
    graphs = {DECODER_GRAPH: GraphInMemory(weights.model.SerializeToString(), arrays)}
    smoothed = Model(bundle, OnnxRuntimeBackend(bundle, graphs=graphs))
    example = next(item for item in read_examples(pairs) if item.images)
    logits = []
    for model in (load(tiny_bundle), smoothed):
        session = model.session(list(example.images), example.prompt, max_new_tokens=4, return_logits=True)
        assert session.text is not None
        logits.append(session.logits)
    if powers:
        np.testing.assert_array_equal(logits[0], logits[1])
    else:
        np.testing.assert_allclose(logits[0], logits[1], atol=2e-5 * np.abs(logits[0]).max())
        assert (logits[0] != logits[1]).any()


def test_channels_that_are_small_in_one_half_are_smoothed_little() -> None:
    """A channel that is small in one half of the examples and large in the other would saturate."""
    generator = np.random.default_rng(3)
    weight = generator.normal(size=(48, 64)).astype(np.float32)
    halves = nothing(64)
    for index, half in enumerate(halves):
        rows = generator.normal(size=(200, 64)).astype(np.float32) * np.where(generator.random(64) < 0.3, 30, 0.1)
        half.prompt.update(rows.astype(np.float32), priorities(0, index, 0, 0, 200))
    item = Candidate(weight, np.abs(weight).max(axis=0), merged(halves), halves)
    careful = search([item], True, EXPONENTS, powers=False)
    assert careful.exponent is None or careful.exponent <= 0.3
    careless = Candidate(item.weight, item.largest, item.observed, (item.observed, nothing(64)[0]))
    exponent = search([careless], True, EXPONENTS, powers=False).exponent
    assert exponent is not None
    assert exponent >= 0.5
