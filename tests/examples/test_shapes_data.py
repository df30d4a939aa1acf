"""Drawn data: the format that is promised, and answers that the pixels and the words bear out."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import data
import digits
import numpy as np
import pytest
import shapes
from PIL import Image
from task import COLORS, NUMBER_WORDS, SIZE

from runtime.errors import MonoedgeError

SCRIPT = Path(data.__file__)
PLACES = [f"{row} {column}" for row in shapes.ROWS for column in shapes.COLUMNS]


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


def drawn(folder: Path, *options: str) -> list[dict[str, str | None]]:
    data.main([str(folder), *options])
    return [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def kind_of(record: dict[str, str | None], task: data.Task) -> str:
    """The kind of a written question, by the words that it begins with."""
    prompt = str(record["prompt"]).splitlines()[-1]
    scene = task.scene(seeded(0), task.LEVELS)
    return next(item.kind for item in scene.questions() if item.prompt.split()[:2] == prompt.split()[:2])


@pytest.mark.parametrize("task", data.TASKS)
def test_format(task: str, tmp_path: Path) -> None:
    records = drawn(tmp_path / "out", "--task", task, "--count", "37", "--text-only", "0.3")
    assert len(records) == 37
    for record in records:
        assert list(record) == ["image", "prompt", "answer"]
        if record["image"] is not None:
            with Image.open(tmp_path / "out" / record["image"]) as image:
                assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
    assert {kind_of(record, data.TASKS[task]) for record in records} == set(data.TASKS[task].KINDS)
    named = {record["image"] for record in records} - {None}
    assert {f"pictures/{file.name}" for file in (tmp_path / "out/pictures").iterdir()} == named
    assert 0 < sum(record["image"] is None for record in records) < len(records) / 2


def test_same_options_same_bytes(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        drawn(tmp_path / name, "--count", "12", "--text-only", "0.25", "--seed", str(seed))
        files = sorted((tmp_path / name).rglob("*.*"))
        return {str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files}

    assert content("a", 1) == content("b", 1) != content("c", 2)


def test_kinds_and_share(tmp_path: Path) -> None:
    records = drawn(tmp_path / "a", "--count", "20", "--kinds", "color", "count", "--text-only", "0.5")
    assert [kind_of(record, shapes) for record in records] == ["color", "count"] * 10
    assert sum(record["image"] is None for record in records) == 10
    assert all(record["image"] is None for record in drawn(tmp_path / "b", "--count", "9", "--text-only", "1"))


# ---- what is true ----------------------------------------------------------------------------------------


def colors_by_place(image: Image.Image) -> dict[str, str]:
    """What stands where on the nine places, found in the pixels alone."""
    pixels = np.asarray(image, np.int32)
    found = {}
    for number, place in enumerate(PLACES):
        row, column = divmod(number, 3)
        cell = pixels[149 * row : 149 * (row + 1), 149 * column : 149 * (column + 1)].reshape(-1, 3)
        inside = cell[np.abs(cell - pixels[0, 0]).sum(1) > 60]
        if len(inside) > 300:
            distances = {name: np.abs(np.median(inside, 0) - value).sum() for name, value in COLORS.items()}
            found[place] = min(distances, key=distances.__getitem__)
    return found


@pytest.mark.parametrize("level", [1, 2, 3])
def test_shapes_are_where_the_answers_say(level: int) -> None:
    for seed in range(40):
        scene = shapes.scene(seeded(seed), level)
        found = colors_by_place(scene.draw())
        answers = [(question.kind, question.answer) for question in scene.questions()]
        assert ("count", shapes.counted(len(found), "shape")) in answers
        described = next(answer for kind, answer in answers if kind == "describe")
        for place, color in found.items():
            assert any(f"{color} {name} at the {place}" in described for name in shapes.SHAPES), described
        assert described.count(" at the ") == len(found) <= level


def test_shapes_look_different() -> None:
    """The share of its square that a shape covers, from its geometry."""
    areas = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9, "star": None}
    for name, expected in areas.items():
        shape = shapes.Shape(name, "red", 1, 1, 224, 224, 60, (255, 0, 0))
        covered = np.asarray(shape.cover()).sum() / 255 / 121**2
        five_points = 5 * 0.42 * np.sin(np.pi / 5) / 4  # ten triangles of sides 1 and 0.42
        assert covered == pytest.approx(five_points if expected is None else expected, rel=0.06), name


def test_digits_light_the_right_segments() -> None:
    """The three level bars by digit, as such displays show them with a tail on 6 and 9."""
    lit = {"top": "02356789", "middle": "2345689", "bottom": "0235689"}
    bars = {"top": 134, "middle": 224, "bottom": 314}
    pictures = set()
    for digit in range(10):
        scene = digits.DigitsScene((255,) * 3, (digit,), "black", (0,) * 3, half=50, left=0, top=0)
        dark = np.asarray(scene.draw().convert("L")) < 128
        shown = {bar for bar, row in bars.items() if dark[row, 200:248].all()}
        assert shown == {bar for bar, its in lit.items() if str(digit) in its}, digit
        pictures.add(dark.tobytes())
    assert len(pictures) == 10


def test_what_is_told_of_shapes_answers_every_question() -> None:
    """No color, shape or place of an answer is missing in the telling or in a recital."""
    telling = {*COLORS, *shapes.SHAPES, *shapes.ROWS, *shapes.COLUMNS}
    for seed in range(100):
        rng = seeded(seed)
        scene = shapes.scene(rng)
        for told in (scene.tell(rng), scene.recital(rng).answer):
            words = set(re.findall(r"\w+", told))
            for question in scene.questions():
                assert set(re.findall(r"\w+", question.answer)) & telling <= words, (told, question)


def test_what_is_told_of_a_number_says_digits_and_color() -> None:
    for seed in range(100):
        rng = seeded(seed)
        scene = digits.scene(rng)
        told = scene.tell(rng)
        assert scene.color in told
        assert sorted(re.findall(r"\d", told)) == sorted(scene.number)
        assert sorted(re.findall(r"\d", scene.recital(rng).answer)) == sorted(scene.number)


def test_number_words() -> None:
    assert shapes.counted(1, "shape") == "There is one shape."
    assert shapes.counted(3, "digit") == "There are three digits."
    assert len(NUMBER_WORDS) > max(shapes.LEVELS, digits.LEVELS)


# ---- what goes wrong -------------------------------------------------------------------------------------


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(MonoedgeError, match="exists already"):
        data.main([str(tmp_path), "--count", "1"])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> data.Iterator[data.Item]:
        yield from data.items(shapes, 3, 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write(tmp_path / "out", interrupted(), 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--count", "0"], "--count: expected 1 or more, got 0"),
        (["--text-only", "1.5"], "--text-only: expected 0 to 1, got 1.5"),
        (["--kinds", "number"], "--kinds: expected some of count, color"),
    ],
)
def test_bad_options_are_told(options: list[str], words: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "out"), *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []
