"""Draws pictures with questions and true answers: training, held-out and calibration data, any number, any seed."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import digits
import shapes
from task import Question, Scene, Task

from runtime.console.console import Console
from runtime.console.files import new_folder
from runtime.console.run import run

_DESCRIPTION = """\
Draws pictures with questions and true answers into a new folder: pictures/*.png, and data.jsonl with one
object a line, {"image": a path relative to the folder, or null, "prompt": …, "answer": …}. Without an image
the scene is told in words in front of the question.

examples:
  python examples/shapes/data.py drawn                            # 1000 questions about 200 pictures
  python examples/shapes/data.py drawn --count 200 --text-only 0.25 --seed 7
  python examples/shapes/data.py drawn --task digits --kinds number

The same options give the same bytes. Nothing is kept of a run that was interrupted or failed."""

TASKS: dict[str, Task] = {"shapes": shapes, "digits": digits}
"""What can be drawn, by name."""

DATA_FILE = "data.jsonl"


@dataclass(frozen=True)
class Item:
    """A question about a scene; ``in_words`` is None where the scene is drawn, otherwise the scene told."""

    number: int
    scene: Scene
    question: Question
    in_words: str | None

    @property
    def prompt(self) -> str:
        """What the model is asked: the question, after the scene where that is told."""
        return self.question.prompt if self.in_words is None else f"{self.in_words}\n{self.question.prompt}"


def scene_of(task: Task, seed: int, number: int, level: int | None = None) -> tuple[Scene, random.Random]:
    """Scene ``number`` of a seed, and the generator to go on with; any scene without those before it."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311 - no secret; a str, whose hash is the same everywhere
    return task.scene(rng, task.LEVELS if level is None else level), rng


def items(
    task: Task, count: int, seed: int, kinds: Sequence[str] | None = None, text_only: float = 0
) -> Iterator[Item]:
    """Questions about scenes of the hardest level, one of each kind a scene.

    Args:
        task: what to draw.
        count: how many questions.
        seed: the same seed gives the same items.
        kinds: of ``task.KINDS``; all of them by default.
        text_only: the share of scenes that are told in words, 0 … 1.
    """
    number = 0
    while count > 0:
        scene, rng = scene_of(task, seed, number)
        # Spread evenly, so that every run of scenes has its share.
        in_words = scene.tell(rng) if int((number + 1) * text_only) > int(number * text_only) else None
        for kind in (kinds or task.KINDS)[:count]:
            question = rng.choice([item for item in scene.questions() if item.kind == kind])
            yield Item(number, scene, question, in_words)
            count -= 1
        number += 1


def write(target: Path, stream: Iterator[Item], total: int) -> None:
    """Writes items into a new folder, as the command line does, one at a time.

    Raises:
        MonoedgeError: the target exists or cannot be written.
    """
    with new_folder(target) as folder:
        (folder / "pictures").mkdir()
        drawn = -1
        with (folder / DATA_FILE).open("w", encoding="utf-8") as lines:
            for item in Console().track(stream, "drawing", total, "question"):
                image = None if item.in_words is not None else f"pictures/{item.number:06}.png"
                if image is not None and item.number != drawn:
                    item.scene.draw().save(folder / image)
                    drawn = item.number
                record = {"image": image, "prompt": item.prompt, "answer": item.question.answer}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument("--task", choices=tuple(TASKS), default="shapes", help="what to draw (default shapes)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="questions (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of scenes and questions (default 0)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help=f"kinds of questions, one of each a scene (default all: {', '.join(shapes.KINDS)} about shapes, "
        f"{', '.join(digits.KINDS)} about digits)",
    )
    parser.add_argument(
        "--text-only",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="the share of scenes told in words instead of drawn, 0 to 1 (default 0)",
    )
    arguments = parser.parse_args(argv)
    task = TASKS[arguments.task]
    if arguments.count < 1:
        parser.error(f"argument --count: expected 1 or more, got {arguments.count}")
    if not 0 <= arguments.text_only <= 1:
        parser.error(f"argument --text-only: expected 0 to 1, got {arguments.text_only}")
    for kind in arguments.kinds or ():
        if kind not in task.KINDS:
            parser.error(f"argument --kinds: expected some of {', '.join(task.KINDS)}, got {kind}")

    stream = items(task, arguments.count, arguments.seed, arguments.kinds, arguments.text_only)
    write(arguments.output, stream, arguments.count)
    print(f"{arguments.output / DATA_FILE}: {arguments.count} questions", file=sys.stderr)


if __name__ == "__main__":
    run(main)
