"""Draws the example's pictures and writes down what the fp32 PyTorch model answers to every question about them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data import TASKS, scene_of

from runtime.console.run import need, run

if TYPE_CHECKING:
    from lessons import Lessons
    from student import Student
    from task import Question, Scene

_DESCRIPTION = """\
Draws pictures/ and writes answers.jsonl, one object a line: image, prompt, answer (the true one) and pytorch (what the
checkpoint answers, greedily, in fp32 with the PyTorch model). An exported bundle must give these answers, true or not.

example:
  python examples/shapes/record.py --ckpt examples/shapes/checkpoint -o examples/shapes"""

PICTURES = 16
ANSWERS_FILE = "answers.jsonl"
LONGEST = 64
"""Tokens of an answer, at most."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, draws, asks and writes."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, type=Path, help="the checkpoint that answers")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", type=Path, help="the folder to write to")
    parser.add_argument("--task", choices=tuple(TASKS), default="shapes", help="what to draw (shapes)")
    parser.add_argument("--count", type=int, default=PICTURES, metavar="N", help=f"pictures ({PICTURES})")
    parser.add_argument("--seed", type=int, default=4242, metavar="N", help="of the scenes (4242)")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"argument --count: expected 1 or more, got {arguments.count}")
    need("torch", "onnx", "safetensors", "tqdm")
    from student import load
    from tqdm import trange
    from train import MAX_LENGTH, lessons_for

    student = load(arguments.ckpt, MAX_LENGTH)
    lessons = lessons_for(student.config)
    (arguments.output / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in trange(arguments.count, unit="picture", file=sys.stderr):
        scene, _ = scene_of(TASKS[arguments.task], arguments.seed, number)
        image = f"pictures/p{number:03}.png"
        scene.draw().save(arguments.output / image)
        for question in scene.questions():
            said = answer(student, lessons, scene, question)
            record = {"image": image, "prompt": question.prompt, "answer": question.answer, "pytorch": said}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    (arguments.output / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")


def answer(student: Student, lessons: Lessons, scene: Scene, question: Question) -> str:
    """The likeliest token again and again, each computed from nothing."""
    import torch
    from student import Batch

    example = lessons.single(scene, question)
    ids = example.ids[: next(place for place, label in enumerate(example.labels) if label >= 0) + 1]
    start, pixels = len(ids), torch.from_numpy(example.pixels)[None]
    stops = [lessons.tokenizer.id_of(token) for token in lessons.template.stop_tokens]
    while len(ids) < start + LONGEST and ids[-1] not in stops:
        tokens = torch.tensor([ids])
        seen = tokens == lessons.tokenizer.id_of(lessons.template.image_context)
        with torch.no_grad():
            logits = student(Batch(tokens, torch.full_like(tokens, -100), seen, pixels))
        ids.append(int(logits[0, -1].argmax()))
    return lessons.tokenizer.decode(ids[start:])


if __name__ == "__main__":
    run(main)
