"""Asks a bundle questions whose answers are known and counts the true ones, by kind of question."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data import TASKS, Item, items

from runtime.console.console import Console
from runtime.console.run import run
from runtime.model import Model

_DESCRIPTION = """\
Asks a bundle questions about newly drawn pictures, as an app would, and prints how many answers are true to the
letter. The pictures of a seed are not those of training, which draws from seeds of another form.

examples:
  python examples/shapes/evaluate.py --bundle bundle/
  python examples/shapes/evaluate.py --bundle bundle/ --count 200 --text-only 1    # scenes told, not drawn
  python examples/shapes/evaluate.py --bundle bundle-digits/ --task digits"""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, asks and prints a table."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="the bundle to ask")
    parser.add_argument("--task", choices=tuple(TASKS), default="shapes", help="what to ask about (shapes)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="questions (1000)")
    parser.add_argument("--seed", type=int, default=4242, metavar="N", help="of scenes and questions (4242)")
    parser.add_argument("--text-only", type=float, default=0.0, metavar="SHARE", help="told scenes, 0 to 1 (0)")
    parser.add_argument("--wrong", action="store_true", help="list the wrong answers too")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error(f"argument --count: expected 1 or more, got {arguments.count}")
    if not 0 <= arguments.text_only <= 1:
        parser.error(f"argument --text-only: expected 0 to 1, got {arguments.text_only}")
    import runtime

    model = runtime.load(arguments.bundle)
    asked = items(TASKS[arguments.task], arguments.count, arguments.seed, text_only=arguments.text_only)
    tracked = Console().track(asked, "asking", arguments.count, "question")
    results = [(item, answer(model, item)) for item in tracked]
    if arguments.wrong:
        for item, said in results:
            if said != item.question.answer:
                print(f"scene {item.number}: {item.prompt}\n  true: {item.question.answer}\n  said: {said}")
    print(table(results))


def answer(model: Model, item: Item) -> str:
    """What the model says to one item, in a session of its own."""
    image = None if item.in_words is not None else item.scene.draw()
    return model.session(image, item.prompt, max_new_tokens=64).text


def table(results: Iterable[tuple[Item, str]]) -> str:
    """Markdown: questions and true answers by kind, and in all."""
    asked, true = Counter[str](), Counter[str]()
    for item, said in results:
        asked[item.question.kind] += 1
        true[item.question.kind] += said == item.question.answer
    rows = [(kind, asked[kind], true[kind]) for kind in asked]
    rows.append(("all", asked.total(), true.total()))
    lines = ["| kind of question | asked | true | share |", "| --- | --- | --- | --- |"]
    lines += [f"| {kind} | {number} | {right} | {right / number:.1%} |" for kind, number, right in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
