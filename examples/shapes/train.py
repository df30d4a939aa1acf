"""Trains a small Mono-InternVL by delta tuning: language first, then frozen, while the visual part learns to see."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.console.console import Console
from runtime.console.run import need, run
from runtime.errors import MonoedgeError

if TYPE_CHECKING:
    from course import Stage
    from lessons import Lessons
    from student import Student

    from export.checkpoint.config import ModelConfig

CONSOLE = Console()

_DESCRIPTION = """\
Trains a small Mono-InternVL to answer questions about drawn shapes, by the recipe of the real one:
  language   the language part, on scenes told in words; from here on it is frozen
  patches    patch embedding and projector: each visual token says in words what it sees
  pictures   patch embedding, projector and visual experts, on questions, from one large shape to several small ones
  attention  the same and visual attention experts, with --version 1.5

OUT gets the checkpoint in the official layout (OUT/checkpoint), a log (log.jsonl), a curve (curve.png) and the state
from which the same command goes on after an interruption.

examples:
  python examples/shapes/train.py run                                       # the whole course
  python examples/shapes/train.py run-short --minutes 10                    # as much of it as fits
  python examples/shapes/train.py run-digits --task digits --language run/checkpoint   # another task, same language
  python -m export.onnx --ckpt run/checkpoint -o bundle/
  python examples/shapes/evaluate.py --bundle bundle/"""

TEMPLATE = Path(__file__).parent / "checkpoint"
"""Whose tokenizer and config.json a new checkpoint shares, sizes excepted."""

SIZES: dict[str, dict[str, int | bool]] = {
    "llm_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "vision_config": {"hidden_size": 96},
}
LANGUAGE_TASKS = ("shapes", "shapes", "shapes", "shapes", "digits")
"""What the language part learns to talk about; shapes, with more to look up, four times as often."""

TURNS = 4
"""Questions in a conversation, at most."""

MAX_LENGTH = 1024
"""Tokens in a conversation, at most; 256 of a picture and some thirty a question."""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    arguments = _arguments(argv)
    need("torch", "onnx", "safetensors")
    need("matplotlib")
    import torch
    from course import COURSE
    from data import TASKS

    torch.set_num_threads(arguments.threads)
    steps = TASKS[arguments.task].STEPS
    course = tuple(
        replace(stage, steps=steps.get(stage.name, stage.steps))
        for stage in COURSE
        if not (stage.trains == "language" and arguments.language)
        and not (stage.name == "attention" and arguments.version == "1.0")
    )
    train(
        arguments.output,
        task_name=arguments.task,
        seed=arguments.seed,
        course=course,
        version=arguments.version,
        language=arguments.language,
        minutes=arguments.minutes,
    )


def train(
    output: Path,
    *,
    task_name: str = "shapes",
    seed: int = 0,
    course: tuple[Stage, ...],
    version: str = "1.0",
    language: Path | None = None,
    minutes: float | None = None,
    until: int | None = None,
) -> None:
    """Runs a course, or goes on with one, and writes the checkpoint at its end.

    Args:
        output: the folder of the run.
        task_name: what pictures show.
        seed: of weights and data.
        course: the stages.
        version: ``1.0``, or ``1.5`` with attention experts.
        language: a checkpoint to take the language part from, instead of training it.
        minutes: shortens every stage alike so that all fits.
        until: stop after that many steps; the next call goes on.

    Raises:
        MonoedgeError: the folder holds a run with other settings, or ``language`` does not fit.
    """
    from curve import draw_curve
    from data import TASKS
    from student import save
    from trainer import Settings, Trainer, language_digest, saved_course

    sizes = {section: dict(values) for section, values in SIZES.items()}
    if version == "1.5":
        sizes["llm_config"]["attention_ve"] = True
    student, lessons = new_student(sizes, seed)
    if language is not None:
        _take_language(student, language)
    saved = saved_course(output)
    if minutes is not None:
        course = saved or _shortened(course, minutes, student, lessons, task_name)
    settings = Settings(task_name, seed, course, sizes, language_digest(student) if language else None)
    trainer = Trainer(output, settings, student, lessons, TASKS[task_name], [TASKS[name] for name in LANGUAGE_TASKS])
    if trainer.step or trainer.stage:
        CONSOLE.say(f"{output}: goes on after step {trainer.step} of stage {trainer.stage + 1} of {len(course)}")
    trainer.run(_bar, until)
    draw_curve(output)
    if not trainer.done:
        return
    save(student, TEMPLATE, sizes, output / "checkpoint")
    CONSOLE.say(f"the language part is as it was when it was frozen: SHA-256 {language_digest(student)}")
    CONSOLE.say(
        f"{output / 'checkpoint'} is made; try\n"
        f"  python -m export.onnx --ckpt {output / 'checkpoint'} -o bundle/\n"
        f"  python examples/shapes/evaluate.py --bundle bundle/ --task {task_name}"
    )


# ---- parts -----------------------------------------------------------------------------------------------


def new_student(sizes: dict[str, dict[str, int | bool]], seed: int) -> tuple[Student, Lessons]:
    """A student with random weights, and what makes its lessons."""
    import tempfile

    from student import Student, write_config

    from export.checkpoint.config import read_config

    with tempfile.TemporaryDirectory() as folder:
        write_config(TEMPLATE, sizes, Path(folder))
        config = read_config(Path(folder))
    student = Student(config, MAX_LENGTH)
    student.reset(seed)
    return student, lessons_for(config)


def lessons_for(config: ModelConfig) -> Lessons:
    """What makes lessons for students of a config; all share one tokenizer."""
    import tokenizers
    from lessons import Lessons

    from export.bundle import image_processor
    from export.checkpoint.templates import template
    from export.checkpoint.tokenizer import convert
    from runtime.text.template import ChatTemplate
    from runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(convert(TEMPLATE, config.vocab_size)))
    return Lessons(tokenizer, ChatTemplate.from_json(template(config.template)), image_processor(config), TURNS)


def _take_language(student: Student, folder: Path) -> None:
    from student import load

    # Attention weights are called text_weight where there are visual ones too, in version 1.5.
    language, theirs = (
        {name.replace("text_weight", "weight"): parameter for name, parameter in model.language_parameters()}
        for model in (student, load(folder, MAX_LENGTH))
    )
    if {name: item.shape for name, item in language.items()} != {name: item.shape for name, item in theirs.items()}:
        raise MonoedgeError(f"{folder}: its language part has other sizes than SIZES in {__file__}: make them equal")
    for name, parameter in language.items():
        parameter.data.copy_(theirs[name].data)
    student.start_visual_experts()


def _shortened(
    course: tuple[Stage, ...], minutes: float, student: Student, lessons: Lessons, task_name: str
) -> tuple[Stage, ...]:
    """The course with fewer steps, by how long one step of each stage takes here."""
    from data import TASKS
    from trainer import seconds_a_step

    task, tasks = TASKS[task_name], [TASKS[name] for name in LANGUAGE_TASKS]
    needed = sum(stage.steps * seconds_a_step(stage, student, lessons, task, tasks) for stage in course)
    share = min(1.0, 60 * minutes / needed)
    CONSOLE.say(
        f"the whole course takes about {needed / 60:.0f} minutes here, {minutes:g} minutes are {share:.0%} of it"
    )
    if share < 0.5:
        CONSOLE.say("expect a student that has learned the form of the answers and only part of their content")
    return tuple(replace(stage, steps=max(10, round(stage.steps * share))) for stage in course)


def _bar(steps: Iterable[int], stage: Stage, done: int) -> Iterator[int]:
    CONSOLE.say(f"{stage.name}: {stage.about}")
    yield from CONSOLE.track(steps, stage.name, stage.steps, "step", done)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUT", type=Path, help="folder of the run, new or interrupted")
    parser.add_argument("--task", choices=("shapes", "digits"), default="shapes", help="what it shall see (shapes)")
    parser.add_argument(
        "--language",
        metavar="CKPT",
        type=Path,
        help="take the language part of this checkpoint over, bit for bit, instead of training one",
    )
    parser.add_argument("--version", choices=("1.0", "1.5"), default="1.0", help="1.5 has attention experts (1.0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data (0)")
    parser.add_argument("--minutes", type=float, metavar="M", help="a shorter course, of about M minutes")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads to compute with (1, which the shipped checkpoints were trained with)",
    )
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"argument --threads: expected 1 or more, got {arguments.threads}")
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"argument --minutes: expected more than 0, got {arguments.minutes:g}")
    return arguments


if __name__ == "__main__":
    run(main)
