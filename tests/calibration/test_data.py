"""What is read, what is refused, and what is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration import CalibrationError
from calibration.data import Example, digest, draw, read_examples


def test_lines_of_a_file(pairs: Path) -> None:
    examples = read_examples(pairs)
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert [example.prompt for example in examples] == [line["prompt"] for line in lines]
    assert [example.answer for example in examples] == [line.get("answer") for line in lines]
    assert examples[0].images == (pairs.parent / "0.png",)
    assert examples[-1].images == ()
    assert examples[3].place == "pairs.jsonl, line 4"


def test_several_pictures_blank_lines_and_other_keys(pairs: Path, tmp_path: Path) -> None:
    names = [str(pairs.parent / "0.png"), str(pairs.parent / "1.png")]
    line = json.dumps({"image": names, "prompt": "Which?", "source": "me"})
    (tmp_path / "data.jsonl").write_text(f"\n{line}\n\n")
    (example,) = read_examples(tmp_path / "data.jsonl")
    assert example.images == tuple(map(Path, names))
    assert example.place == "data.jsonl, line 2"


def test_lines_end_where_json_has_line_ends(tmp_path: Path) -> None:
    """JSON's strings may hold what other standards call line ends; a byte order mark is no part of the first line."""
    prompts = ["a\u2028b", "a\u2029b", "a\x85b", "a\u2028"]
    lines = [json.dumps({"image": None, "prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "data.jsonl").write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    examples = read_examples(tmp_path / "data.jsonl")
    assert [example.prompt for example in examples] == prompts
    assert [example.place for example in examples] == [f"data.jsonl, line {number}" for number in range(1, 5)]


def test_a_folder_of_pictures(pairs: Path) -> None:
    examples = read_examples(pairs.parent, "What is this?")
    assert len(examples) == 20  # the JSONL file beside them is no picture
    assert {example.prompt for example in examples} == {"What is this?"}


def test_pictures_are_found_from_the_home_folder(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pairs.parent))
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "~/0.png", "prompt": "Which?"}))
    (example,) = read_examples(tmp_path / "data.jsonl")
    assert example.images == (pairs.parent / "0.png",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "data.jsonl, line 2 is not valid JSON"),
        ("[]", 'line 2: expected an object with "image" and "prompt"'),
        ('{"prompt": "x"}', 'line 2: expected an object with "image" and "prompt"'),
        ('{"image": null, "prompt": " "}', 'line 2: "prompt" should be a text that is not blank'),
        ('{"image": null, "prompt": 3}', 'line 2: "prompt" should be a text that is not blank, got 3'),
        ('{"image": 3, "prompt": "x"}', 'line 2: "image" should be a path, a list of paths or null, got 3'),
        ('{"image": [null], "prompt": "x"}', 'line 2: "image" should be'),
        ('{"image": "gone.png", "prompt": "x"}', "gone.png' does not exist"),
        ('{"image": ".", "prompt": "x"}', "is not a file"),
        ('{"image": "a\\u0000b.png", "prompt": "x"}', "cannot be read (embedded null byte)"),
        ('{"image": "~no-such-user/a.png", "prompt": "x"}', "cannot be read"),
        (f'{{"image": "{"x" * 5000}", "prompt": "x"}}', "cannot be read (File name too long)"),
        ('{"image": null, "prompt": "x", "answer": ""}', 'line 2: "answer" should be a text'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"image": null, "prompt": "fine"}}\n{line}\n')
    with pytest.raises(CalibrationError, match="line 2") as caught:
        read_examples(file)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_nothing_to_read(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        read_examples(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match="has no entries"):
        read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(CalibrationError, match="has no pictures"):
        read_examples(tmp_path, "What?")
    with pytest.raises(CalibrationError, match="--prompt"):
        read_examples(pairs.parent)
    with pytest.raises(CalibrationError, match="--prompt is for a folder"):
        read_examples(pairs, "What?")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match=r"bytes\.jsonl cannot be read"):
        read_examples(tmp_path / "bytes.jsonl")


def examples(count: int) -> list[Example]:
    return [Example(f"line {index}", (), f"question {index}") for index in range(count)]


def test_what_is_observed_is_not_tested_with() -> None:
    observed, tests = draw(examples(100), 40, 20, seed=3)
    assert (len(observed), len(tests)) == (40, 20)
    assert not set(observed) & set(tests)
    assert draw(examples(100), 40, 20, seed=3) == (observed, tests)
    assert draw(examples(100), 40, 20, seed=4) != (observed, tests)


def test_few_examples_are_shared_out() -> None:
    observed, tests = draw(examples(11), 128, 32, seed=0)
    assert (len(observed), len(tests)) == (8, 3)
    observed, tests = draw(examples(2), 128, 32, seed=0)
    assert (len(observed), len(tests)) == (1, 1)
    with pytest.raises(CalibrationError, match="at least 2 entries"):
        draw(examples(1), 128, 32, seed=0)
    given = [Example("other", (), "other question")]
    assert draw(examples(1), 128, 32, seed=0, given=given) == (examples(1), given)


def test_the_digest_sees_every_part(pairs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes((pairs.parent / "0.png").read_bytes())
    example = Example("here", (picture,), "What?", "That.")
    others = [
        Example("here", (picture,), "What", "That."),
        Example("here", (picture,), "What?", None),
        Example("here", (), "What?", "That."),
        Example("here", (picture, picture), "What?", "That."),
        Example("here", (picture,), "What?", "That.", as_stored=True),
    ]
    assert len({digest([item]) for item in [example, *others]}) == 6
    assert digest([example]) == digest([Example("elsewhere", (picture,), "What?", "That.")])
    before = digest([example])
    picture.write_bytes(picture.read_bytes() + b"x")
    assert digest([example]) != before
