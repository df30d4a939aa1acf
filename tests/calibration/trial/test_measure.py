"""Figures against their definitions, in float64 and plain loops."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration import CalibrationError
from calibration.data import Example, read_examples
from calibration.trial.measure import Answered, Comparison, Reference, log_softmax, position
from calibration.trial.prober import Prober
from runtime.bundle.manifest import CHAT_TEMPLATE
from runtime.model import load


def plain_probabilities(logits: np.ndarray) -> list[float]:
    largest = max(float(value) for value in logits)
    powers = [math.exp(float(value) - largest) for value in logits]
    return [power / math.fsum(powers) for power in powers]


@pytest.mark.parametrize("seed", range(5))
def test_positions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    before = (generator.normal(size=50) * 5).astype(np.float32)
    after = before + (generator.normal(size=50) * 10.0 ** -generator.integers(0, 4)).astype(np.float32)
    kl, same, overlap, change = position(before, after, 7)
    p, q = plain_probabilities(before), plain_probabilities(after)
    assert kl == pytest.approx(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-9, abs=1e-15)
    assert same == (p.index(max(p)) == q.index(max(q)))
    top = [set(sorted(range(50), key=lambda token: -values[token])[:5]) for values in (p, q)]
    assert overlap == len(top[0] & top[1]) / 5
    assert change == pytest.approx(math.log(q[7] / p[7]), rel=1e-9, abs=1e-15)


def test_extreme_logits() -> None:
    before = np.array([0, -1e4, 1e4, 0, 0, 0], np.float32)
    np.testing.assert_array_equal(np.exp(log_softmax(before)), [0, 0, 1, 0, 0, 0])
    assert position(before, before, 2)[0] == 0
    assert position(before, -before, 2)[0] == pytest.approx(2e4)


def test_figures() -> None:
    examples = Example("a", (Path("a.png"),), "what?"), Example("b", (), "what?")
    about_picture, about_text = (Answered(example, np.arange(3), (1, 2), 0, "") for example in examples)
    comparison = Comparison()
    comparison.answers += [
        (about_picture, [(0.1, True, 1.0, -0.2), (0.3, True, 0.8, 0.1)]),
        (about_picture, [(0.2, False, 0.6, 0.0)]),
        (about_text, [(0.0, True, 1.0, 0.0)]),
    ]
    figures = comparison.figures()
    assert figures is not None
    assert (figures.questions, figures.tokens) == (3, 4)
    assert figures.same_answers == pytest.approx(2 / 3)
    assert figures.mean_kl == pytest.approx(0.15)
    assert figures.p99_kl == pytest.approx(np.percentile([0.1, 0.3, 0.2, 0.0], 99))
    assert figures.same_top1 == 0.75
    assert figures.top5_overlap == pytest.approx(0.85)
    assert figures.perplexity_ratio == pytest.approx(math.exp(0.1 / 4))
    pictures, text = comparison.figures("image"), comparison.figures("text")
    assert pictures is not None
    assert text is not None
    assert (pictures.questions, pictures.tokens, text.questions, text.tokens) == (2, 3, 1, 1)
    assert pictures.same_answers == 0.5
    assert Comparison().figures() is None


def test_a_bundle_is_as_far_from_itself_as_nothing(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    prober = Prober(load(tiny_v1_bundle), None, 6)
    examples = read_examples(pairs)
    chosen = [examples[1], examples[-1]]
    told: list[int] = []
    reference = Reference(prober, chosen, told.append, tmp_path)
    assert told == [1, 1]
    assert list(tmp_path.iterdir()) == []  # the file of logits has no name
    for example, answered in zip(chosen, reference.answered, strict=True):
        session = prober.model.session(list(example.images), example.prompt, max_new_tokens=6)
        assert session.text is not None
        assert list(answered.ids) == session.generated_ids
    comparison = reference.compare(prober, lambda count: None)
    figures = comparison.figures()
    assert figures is not None
    assert figures.tokens == sum(len(answered.ids) for answered in reference.answered)
    # Steps computed one by one are the same sums in the same order.
    assert (figures.mean_kl, figures.same_answers, figures.top5_overlap) == (0, 1, 1)
    assert figures.perplexity_ratio == 1
    for speed in (comparison.before, comparison.after):
        assert (len(speed.prompts), len(speed.steps)) == (2, figures.tokens - 2)


def test_pictures_are_those_of_sessions(tiny_v1_bundle: Path, tmp_path: Path) -> None:
    """A photo that lies on its side, in a folder and in a file, as seen and as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 30), 50).save(tmp_path / "photo.jpg", exif=exif)
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "photo.jpg", "prompt": "What?"}))
    prober, names = Prober(load(tiny_v1_bundle), None, 2), set()
    for as_stored in (False, True):
        expected = prober.model.session(tmp_path / "photo.jpg", "What?", as_stored=as_stored).answer.prompt
        for data, prompt in ((tmp_path / "data.jsonl", None), (tmp_path, "What?")):
            (example,) = read_examples(data, prompt, as_stored=as_stored)
            assert prober.prompt(example).images[0].name == expected.images[0].name
        names.add(expected.images[0].name)
    assert len(names) == 2


def test_another_model_is_refused(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    reference = Reference(
        Prober(load(tiny_v1_bundle), None, 2), read_examples(pairs)[-1:], lambda count: None, tmp_path
    )
    shutil.copytree(tiny_v1_bundle, tmp_path / "other")
    template = tmp_path / "other" / CHAT_TEMPLATE
    template.write_text(template.read_text().replace(">user", ">uses"))
    with pytest.raises(CalibrationError, match="line 24: the bundles read it as different tokens"):
        reference.compare(Prober(load(tmp_path / "other"), None, 2), lambda count: None)


def test_a_question_that_does_not_fit(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    model = load(tiny_v1_bundle)
    with pytest.raises(CalibrationError, match=r"pairs\.jsonl, line 1: .* are more than the"):
        Prober(model, None, model.max_length).prompt(read_examples(pairs)[0])
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": None, "prompt": "<image> what?"}))
    with pytest.raises(CalibrationError, match=r"data\.jsonl, line 1: expected one <image> placeholder"):
        Prober(model, None, 2).prompt(read_examples(tmp_path / "data.jsonl")[0])
    (tmp_path / "bad.png").write_bytes((pairs.parent / "0.png").read_bytes()[:500])
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "bad.png", "prompt": "what?"}))
    with pytest.raises(CalibrationError, match=r"data\.jsonl, line 1: .*bad\.png.* cannot be decoded"):
        Prober(model, None, 2).prompt(read_examples(tmp_path / "data.jsonl")[0])
