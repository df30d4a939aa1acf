"""The data of a calibration: questions about pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calibration import CalibrationError
from runtime.bundle.reader import sha256_of
from runtime.errors import ImageError
from runtime.images.source import image_file
from runtime.records import find, is_folder, parse_json, read_text

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Endings of the files that are read from a folder."""


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        place: where it was read, for messages: ``pairs.jsonl, line 3``.
        images: the files of its pictures; none for a question about text alone.
        prompt: the question.
        answer: the expected answer; None lets the unquantized bundle answer.
        as_stored: whether pictures are read with the pixels of the official code, not as viewers show them.
    """

    place: str
    images: tuple[Path, ...]
    prompt: str
    answer: str | None = None
    as_stored: bool = False


class Questions(NamedTuple):
    """The questions to observe, and those to measure with."""

    observed: list[Example]
    tests: list[Example]


def read_examples(data: Path, prompt: str | None = None, *, as_stored: bool = False) -> list[Example]:
    """Reads a JSONL file, or a folder of pictures that share one prompt.

    A line is ``{"image": path, list of paths or null, "prompt": text, "answer": text, optional}``. Other keys are
    ignored. Paths are relative to the file's folder. Blank lines are skipped.

    Args:
        data: the file or folder.
        prompt: the question about each picture of a folder; None for a file.
        as_stored: for every example.

    Raises:
        CalibrationError: there is nothing to read, an entry is malformed, or a picture is missing or unreadable; with
            the line.
    """
    if is_folder(data, CalibrationError):
        return _from_folder(data, prompt, as_stored)
    if prompt is not None:
        raise CalibrationError(f"--prompt is for a folder of pictures, and {data} is a file whose lines have prompts")
    if find(data, CalibrationError) is None:
        raise CalibrationError(f"{data} does not exist: expected a JSONL file, or a folder of pictures")
    lines = read_text(data, CalibrationError).split("\n")  # splitlines() would split at U+2028 in a text
    examples = [
        _from_line(line, f"{data.name}, line {number}", data.parent, as_stored)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise CalibrationError(f"{data} has no entries: expected one JSON object a line")
    return examples


def draw(
    examples: Sequence[Example], samples: int, tests: int, seed: int, given: Sequence[Example] | None = None
) -> Questions:
    """Draws questions, in random order. None is both observed and measured with.

    With too few examples for both, a fifth, rounded up, is measured with, and the rest is observed.

    Args:
        examples: what is drawn from.
        samples, tests: the most questions to observe, and to measure with.
        seed: of the random choice.
        given: other examples, to draw the tests from.

    Raises:
        CalibrationError: a single example, which cannot be both observed and measured with.
    """
    if given is not None:
        return Questions(sample(examples, samples, seed), sample(given, tests, seed))
    if len(examples) < 2:
        raise CalibrationError(
            "expected at least 2 entries, one to observe and one to test with, got 1: give more data, or --test-data"
        )
    count = min(tests, -(-len(examples) // 5)) if len(examples) < samples + tests else tests
    order = sample(examples, len(examples), seed)
    return Questions(order[count : count + samples], order[:count])


def sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Returns at most ``count`` of the examples, in random order."""
    return [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))[:count]]


def digest(examples: Sequence[Example]) -> str:
    """Returns the SHA-256 over questions, answers, the bytes of all pictures and how they are read, in order."""
    hashes: dict[Path, str] = {}
    total = hashlib.sha256()
    for example in examples:
        for image in example.images:
            if image not in hashes:
                hashes[image] = sha256_of(image)
        entry = [example.prompt, example.answer, [hashes[image] for image in example.images], example.as_stored]
        total.update(json.dumps(entry).encode() + b"\n")
    return total.hexdigest()


def _from_folder(folder: Path, prompt: str | None, as_stored: bool) -> list[Example]:
    if prompt is None or not prompt.strip():
        raise CalibrationError(f"{folder} is a folder of pictures: say what to ask about each, with --prompt")
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    except OSError as error:
        raise CalibrationError(f"{folder} cannot be read: {error.strerror}") from None
    if not files:
        raise CalibrationError(f"{folder} has no pictures: expected files that end in {', '.join(PICTURES)}")
    return [Example(f"{folder.name}/{file.name}", (file,), prompt, as_stored=as_stored) for file in files]


def _from_line(line: str, place: str, folder: Path, as_stored: bool) -> Example:
    entry = parse_json(line, place, CalibrationError)
    if not isinstance(entry, dict) or "image" not in entry or "prompt" not in entry:
        raise CalibrationError(f'{place}: expected an object with "image" and "prompt", got {line.strip()[:80]}')
    prompt, answer = entry["prompt"], entry.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise CalibrationError(f'{place}: "prompt" should be a text that is not blank, got {json.dumps(prompt):.200}')
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        wanted = "a text that is not blank, or left out"
        raise CalibrationError(f'{place}: "answer" should be {wanted}, got {json.dumps(answer):.200}')
    return Example(place, _pictures(entry["image"], place, folder), prompt, answer, as_stored)


def _pictures(image: Any, place: str, folder: Path) -> tuple[Path, ...]:  # noqa: ANN401 - checked here
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        got = json.dumps(image)[:80]
        raise CalibrationError(f'{place}: "image" should be a path, a list of paths or null, got {got}')
    try:
        return tuple(image_file(name, folder) for name in names)
    except ImageError as error:
        raise CalibrationError(f"{place}: {error}") from None
