"""Distributions against transformers' own processors, draws against the distributions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.errors import BackendError, OptionError
from runtime.options import SamplingOptions
from runtime.sampling import Sampler

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SMOOTH = st.floats(-40, 40, width=32)
COARSE = st.integers(-3, 3).map(float)  # many ties


def row(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def transformers_probabilities(logits: np.ndarray, previous_ids: list[int], options: SamplingOptions) -> np.ndarray:
    """What `generate` draws from, computed by its own classes."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    processors = []
    if options.repetition_penalty != 1:
        processors.append(process.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.do_sample:
        processors.append(process.TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            processors.append(process.TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(process.TopPLogitsWarper(options.top_p))
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors:
        scores = processor(torch.tensor([previous_ids], dtype=torch.long), scores)
    if not options.do_sample:
        return np.eye(len(logits), dtype=np.float32)[int(scores.argmax())]
    return torch.softmax(scores, dim=-1)[0].numpy()


def cut_is_clear(logits: np.ndarray, previous_ids: list[int], options: SamplingOptions) -> bool:
    """Whether no cumulative probability is so near 1 - top_p that rounding decides what is kept."""
    before = transformers_probabilities(logits, previous_ids, dataclasses.replace(options, top_p=1.0))
    cumulative = np.cumsum(np.sort(before.astype(np.float64)))
    return bool(np.abs(cumulative - (1 - options.top_p)).min() > 1e-5)


# ---- the distribution ------------------------------------------------------------------------------------


@given(
    logits=st.one_of(st.lists(SMOOTH, min_size=1, max_size=60), st.lists(COARSE, min_size=1, max_size=60)),
    temperature=st.floats(0.1, 4),
    top_k=st.one_of(st.none(), st.integers(0, 70)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 3)),
    do_sample=st.booleans(),
    data=st.data(),
)
@settings(max_examples=400, deadline=None)
def test_distribution_is_the_one_of_transformers(
    logits, temperature, top_k, top_p, repetition_penalty, do_sample, data
):
    logits = row(*logits)
    previous_ids = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=20))
    options = SamplingOptions(do_sample, temperature, top_k, top_p, repetition_penalty)
    assume(top_p == 1 or cut_is_clear(logits, previous_ids, options))

    ours = Sampler(options).probabilities(logits, previous_ids)
    theirs = transformers_probabilities(logits, previous_ids, options)
    if options.top_p < 1:  # among equal logits at the cut, torch.sort keeps any
        assert set(logits[ours > 0]) == set(logits[theirs > 0])
        ours, theirs = np.sort(ours), np.sort(theirs)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0])  # from nearly flat to peaked
@pytest.mark.parametrize("top_k", [0, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_a_whole_vocabulary(scale, top_k, top_p):
    rng = np.random.default_rng(3)
    logits = rng.normal(0, scale, 92553).astype(np.float32)
    options = SamplingOptions(do_sample=True, temperature=0.8, top_k=top_k, top_p=top_p, repetition_penalty=1.2)
    previous_ids = rng.integers(0, 92553, 500).tolist()

    ours = Sampler(options).probabilities(logits, previous_ids)
    theirs = transformers_probabilities(logits, previous_ids, options)
    # Here neighbours at the cut are 1e-9 … 1e-5 apart, so that rounding moves it by a few tokens.
    assert abs(int((ours > 0).sum()) - int((theirs > 0).sum())) <= max(2, 2e-4 * (theirs > 0).sum())
    np.testing.assert_allclose(ours.sum(), 1, atol=1e-5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("count", range(1, 17))
def test_the_boundary_of_top_p_among_equal_logits(count):
    """Each of n equal logits has 1/n exactly as torch rounds it; every k/n is a boundary case."""
    logits = np.full(count, 1.5, np.float32)
    for kept in range(count + 1):
        options = SamplingOptions(do_sample=True, top_k=None, top_p=kept / count)
        ours = Sampler(options).probabilities(logits, [])
        np.testing.assert_array_equal(ours, transformers_probabilities(logits, [], options))


def test_top_k_keeps_what_ties_with_the_last():
    options = SamplingOptions(do_sample=True, top_k=2)
    probabilities = Sampler(options).probabilities(row(1, 3, 2, 2, 0), [])
    assert probabilities.nonzero()[0].tolist() == [1, 2, 3]


def test_top_p_keeps_the_last_of_equal_logits_and_always_one():
    logits = row(0, 5, 5, 5)
    options = SamplingOptions(do_sample=True, top_p=0.0)
    np.testing.assert_array_equal(Sampler(options).probabilities(logits, []), row(0, 0, 0, 1))


def test_repetition_penalty_counts_a_token_once_and_pushes_both_signs_down():
    options = SamplingOptions(do_sample=True, top_k=0, repetition_penalty=2.0)
    probabilities = Sampler(options).probabilities(row(2, -2, 2, -2), [0, 1, 1, 0, 1])
    expected = np.exp(row(1, -4, 2, -2))
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-6)


def test_ids_without_a_logit_are_not_penalized():
    options = SamplingOptions(do_sample=True, repetition_penalty=2.0)
    sampler = Sampler(options)
    np.testing.assert_array_equal(sampler.probabilities(row(1, 2), [2, 7]), sampler.probabilities(row(1, 2), []))


# ---- choosing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["tiny-v1/text_only", "tiny-v1/one_tile", "tiny-v15/wide_tiles6"])
def test_greedy_gives_the_official_answer_from_the_official_logits(case):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    sampler = Sampler(SamplingOptions())
    chosen = [sampler.next(logits, []) for logits in tensors["step_logits"]]
    assert chosen == tensors["generated_ids"].tolist()


def test_greedy_ties_go_to_the_lowest_id():
    token = Sampler(SamplingOptions()).next(row(1, 4, 4, 2), [])
    assert token == 1
    assert type(token) is int


def test_greedy_heeds_the_repetition_penalty():
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5))
    assert sampler.next(row(1, 4, 3), np.array([1])) == 2
    assert sampler.next(row(-9, -3, -4), [1]) == 2
    assert sampler.next(row(1, 4, 3), []) == 1


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.25, 0.15, 0.09, 0.01])
    sampler = Sampler(SamplingOptions(do_sample=True, seed=11))
    logits = np.log(probabilities).astype(np.float32)
    draws = 20_000
    counts = np.bincount([sampler.next(logits, []) for _ in range(draws)], minlength=5)
    assert (np.abs(counts - draws * probabilities) < 5 * np.sqrt(draws * probabilities)).all()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {4, 1}),
        ({"top_p": 0.6}, {4, 1}),
        ({"top_k": 1}, {4}),
        ({"top_k": 0}, {1, 2, 4}),  # the others are -inf, or 200 below
        ({"temperature": 1e-5}, {4}),
    ],
)
def test_only_what_is_left_is_drawn(options, allowed):
    sampler = Sampler(SamplingOptions(do_sample=True, seed=0, **options))
    logits = row(-np.inf, 1.5, 1, -200, 2, -np.inf)
    assert {sampler.next(logits, []) for _ in range(400)} == allowed


def test_a_seed_repeats_its_draws_and_no_seed_does_not():
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(do_sample=True, top_k=0, seed=seed))
        return [sampler.next(np.zeros(1000, np.float32), []) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_are_left_as_they_are(do_sample):
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32)
    before = logits.copy()
    options = SamplingOptions(do_sample, temperature=0.5, top_p=0.8, repetition_penalty=1.3)
    Sampler(options).next(logits, [1, 2, 3])
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "logits", [row(1, np.nan, 3), row(1, np.inf, 3), row(-np.inf, -np.inf), row(), row(1, 2)[None]]
)
def test_unusable_logits_are_refused(logits, do_sample):
    with pytest.raises(BackendError, match="the decoder returned"):
        Sampler(SamplingOptions(do_sample)).next(logits, [])


# ---- options ---------------------------------------------------------------------------------------------


def test_defaults_are_those_of_transformers():
    config = pytest.importorskip("transformers").GenerationConfig()
    defaults = config._get_default_generation_params()
    for field in dataclasses.fields(SamplingOptions):
        if field.name != "seed":
            assert field.default == defaults[field.name], field.name


@pytest.mark.parametrize(
    ("name", "values", "range_"),
    [
        ("do_sample", [1, None, "yes"], "True or False"),
        ("temperature", [0, -1, 1e6, float("nan"), float("inf"), True, "1", None], "from 1e-05 to 100000"),
        ("top_p", [-0.1, 1.1, float("nan"), False, "0.9", None], "from 0 to 1"),
        ("repetition_penalty", [0, -1.0, float("inf"), True, "1", None], "from 1e-05 to 100000"),
        ("top_k", [-1, 1.0, True, "50"], "at least 0, or None"),
        ("seed", [-1, 0.5, True, "7"], "at least 0, or None"),
    ],
)
def test_options_out_of_range_are_refused(name, values, range_):
    for value in values:
        with pytest.raises(OptionError, match=f"{name} must be .*{range_}, got ") as caught:
            SamplingOptions(**{name: value})
        assert repr(value) in str(caught.value)


def test_temperature_zero_is_told_what_to_use():
    with pytest.raises(OptionError, match="do_sample=False"):
        SamplingOptions(do_sample=True, temperature=0.0)


def test_whole_numbers_are_fine_where_fractions_are():
    SamplingOptions(do_sample=True, temperature=1, top_p=1, repetition_penalty=2, top_k=None, seed=0)
