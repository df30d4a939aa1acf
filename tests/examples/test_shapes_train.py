"""A short course from end to end: what it must learn and what leave alone, and that interruptions change nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import course
import data
import evaluate
import numpy as np
import pytest
import shapes
import student
import torch
import train
from safetensors.torch import load_file, save_file

import runtime
from export.checkpoint.config import read_config
from export.checkpoint.tensors import all_sources
from export.onnx import main as export
from runtime.errors import MonoedgeError

ROOT = Path(__file__).parents[2]
SIZES: dict[str, dict[str, int | bool]] = {
    "llm_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision_config": {"hidden_size": 16},
}
STEPS = {"lookups": (60, 8), "language": (6, 2), "patches": (30, 2), "pictures": (6, 2), "attention": (4, 2)}


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


def short(*names: str) -> tuple[course.Stage, ...]:
    stages = {stage.name: stage for stage in course.COURSE}
    return tuple(replace(stages[name], steps=STEPS[name][0], batch=STEPS[name][1]) for name in names)


WHOLE = short("lookups", "language", "patches", "pictures")
LANGUAGE_STEPS = STEPS["lookups"][0] + STEPS["language"][0]


@pytest.fixture(scope="module", autouse=True)
def small() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "SIZES", SIZES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its beginning to its end."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.train(folder, course=WHOLE)
    return folder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """All weights of the same run at the step where the language part is frozen."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    train.train(folder, course=WHOLE, until=LANGUAGE_STEPS)
    return load_file(folder / "state.safetensors")


def is_language(name: str) -> bool:
    """By its official name, whether a tensor belongs to the language part."""
    return name.startswith("language_model.") and "_ve." not in name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def test_loss_falls(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["stage"] for record in records} == {stage.name for stage in WHOLE}
    for name, part in (("lookups", 0.6), ("patches", 0.8)):
        losses = [record["loss"] for record in records if record["stage"] == name]
        assert losses[-1] < part * losses[0], (name, losses)
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_ends_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    """Interrupted within each stage and where one ends."""
    for steps in (20, LANGUAGE_STEPS - 20, 17, 16):
        train.train(tmp_path / "run", course=WHOLE, until=steps)
        assert not (tmp_path / "run" / "checkpoint").exists()
    train.train(tmp_path / "run", course=WHOLE)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (tmp_path / "run/checkpoint" / name).read_bytes() == (trained / "checkpoint" / name).read_bytes()
    assert (tmp_path / "run/log.jsonl").read_bytes() == (trained / "log.jsonl").read_bytes()


def test_an_interruption_in_the_middle_of_a_step_loses_no_more_than_what_was_not_saved(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.nn.utils.clip_grad_norm_
    calls = iter(range(1000))

    def interrupted(*arguments: object) -> object:
        if next(calls) == 55:
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "run", course=WHOLE)
    train.train(tmp_path / "run", course=WHOLE)
    assert next(calls) == 55 + 1 + sum(stage.steps for stage in WHOLE) - 50
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(trained)[name]), name


def test_the_language_part_stays_as_it_was_frozen(
    trained: Path, frozen: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """From the step at which its training ends on, and into a second task, bit for bit."""
    after = student.load(trained / "checkpoint", 512)
    for name, parameter in after.language_parameters():
        assert torch.equal(parameter, frozen[name]), name
    digits = short("patches", "pictures")
    train.train(tmp_path / "digits", task_name="digits", course=digits, language=trained / "checkpoint")
    ours, theirs = weights(trained), weights(tmp_path / "digits")
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) or not is_language(name), name
    patches = "vision_model.embeddings.patch_embedding.weight"
    assert not torch.equal(ours[patches], theirs[patches])


def test_every_visual_tensor_learns(trained: Path, frozen: dict[str, torch.Tensor]) -> None:
    for name, parameter in student.load(trained / "checkpoint", 512).visual_parameters():
        # The last layer's visual expert has no say in any answer: nothing attends to what comes out of it.
        last = name.startswith("decoder.layers.1.feed_forward")
        assert torch.allclose(parameter, frozen[name].bfloat16().float(), atol=1e-3) == last, name


def test_the_runtime_reads_what_the_student_learned_from(trained: Path, tmp_path: Path) -> None:
    """Same tokens, same pixels, same logits: training and answering are the same function."""
    export(["--ckpt", str(trained / "checkpoint"), "-o", str(tmp_path / "bundle")])
    model = runtime.load(tmp_path / "bundle")
    learner = student.load(trained / "checkpoint", 512)
    _, lessons = train.new_student(train.SIZES, 0)
    for item in data.items(shapes, 5, seed=3):
        example = lessons.single(item.scene, item.question)
        with torch.no_grad():
            logits = learner(lessons.collate([example]))[0].numpy()
        session = model.session(item.scene.draw(), item.prompt, return_logits=True, max_new_tokens=1)
        assert session.text is not None
        length = len(session.prompt_ids)
        assert session.prompt_ids == example.ids[:length]
        answer = [label for label in example.labels if label >= 0]
        assert model.tokenizer.decode(answer) == item.question.answer
        assert answer[-1] in model.stop_ids
        assert example.labels[length - 1] == answer[0]
        assert session.logits is not None
        np.testing.assert_allclose(session.logits[0], logits[length - 1], rtol=0, atol=1e-3)


def test_conversations_are_cut_as_the_runtime_cuts_them() -> None:
    """Piece by piece encoded, a conversation of several turns is what the whole text encodes to."""
    _, lessons = train.new_student(train.SIZES, 0)
    template, tokenizer = lessons.template, lessons.tokenizer
    for seed in range(5):
        scene = shapes.scene(seeded(seed))
        questions = list(scene.questions())
        example = lessons._conversation(scene, questions, "words", [[("red", 1.0)]] * 256)
        turns = [(question.prompt, question.answer) for question in questions]
        turns[0] = (template.place_images(turns[0][0], [1], 256), turns[0][1])
        assert example.ids == tokenizer.encode(template.render(turns))
        assert (np.array(example.ids) == tokenizer.id_of("<IMG_CONTEXT>")).nonzero()[0].tolist() == list(
            range(example.seen_from, example.seen_from + 256)
        )


def test_words_on_places_are_those_of_the_picture() -> None:
    """A scene drawn and its words agree on where something is."""
    _, lessons = train.new_student(train.SIZES, 0)
    for seed in range(10):
        scene = shapes.scene(seeded(seed))
        _, words = lessons.places(scene.parts(), None)
        pixels = np.asarray(scene.draw(), np.int32)
        differs = np.abs(pixels - np.asarray(scene.background)).sum(-1) > 30
        share = differs.reshape(16, 28, 16, 28).mean((1, 3)).flatten()
        for place, covered in zip(words, share, strict=True):
            if covered < 0.08:
                assert place[0][0] == "-"
            elif covered > 0.12:
                assert place[0][0] in {shape.color for shape in scene.shapes}


def test_version_15_begins_where_10_ends(trained: Path, tmp_path: Path) -> None:
    stages = short("patches", "pictures", "attention")
    train.train(tmp_path / "run", course=stages, version="1.5", language=trained / "checkpoint")
    config = read_config(tmp_path / "run/checkpoint")
    assert config.version == "1.5"
    tensors = weights(tmp_path / "run")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        source.name: source.shape for source in all_sources(config)
    }
    layer = "language_model.model.layers.0.attention."
    assert not torch.equal(tensors[layer + "wqkv.weight"], tensors[layer + "wqkv_ve.weight"])
    assert torch.equal(tensors[layer + "wqkv.weight"], weights(trained)[layer + "wqkv.weight"])


def test_minutes_shorten_the_course_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "run")
    train.main([output, "--minutes", "0.02"])
    told = capfd.readouterr().err
    assert "the whole course takes about" in told
    assert "only part of their content" in told
    train.main([output, "--minutes", "0.02"])
    assert "the whole course takes about" not in capfd.readouterr().err


def test_a_run_with_other_settings_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(MonoedgeError, match="other settings"):
        train.train(trained, course=WHOLE, seed=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(MonoedgeError, match="not the state of a run"):
        train.train(other, course=WHOLE)
    save_file({"x": torch.zeros(1)}, other / "state.safetensors")
    with pytest.raises(MonoedgeError, match="not the state of a run"):
        train.train(other, course=WHOLE)


def test_a_language_part_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MonoedgeError, match="other sizes"):
        train.train(tmp_path / "run", course=short("patches"), language=ROOT / "tests/data/golden/tiny-v1/checkpoint")


def test_table_counts_by_kind() -> None:
    asked = list(data.items(shapes, 10, 0))
    results = [(item, item.question.answer if item.question.kind != "place" else "no idea") for item in asked]
    lines = evaluate.table(results).splitlines()
    assert "| place | 2 | 0 | 0.0% |" in lines
    assert lines[-1] == "| all | 10 | 8 | 80.0% |"
