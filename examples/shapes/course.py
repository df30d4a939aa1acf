"""What is learned in which order: the stages of delta tuning, each with what it trains and its loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lessons import Lessons
from student import Batch, Student
from task import Task


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: one of ``lookups``, ``language``, ``patches``, ``pictures``, ``attention``.
        trains: ``language``, ``vision`` (patch embedding and projector), ``experts`` (vision and visual feed-forward
            experts) or ``attention`` (those and visual attention experts).
        steps: optimizer steps.
        batch: conversations a step.
        rate: highest learning rate.
        about: a line for whoever watches.
    """

    name: str
    trains: str
    steps: int
    batch: int
    rate: float
    about: str


COURSE = (
    Stage("lookups", "language", 900, 32, 2e-3, "the language part, on one question about few words"),
    Stage("language", "language", 3600, 16, 2e-3, "the language part, on conversations about scenes in words"),
    Stage("patches", "vision", 1600, 16, 3e-3, "what each visual token sees, in words"),
    Stage("pictures", "experts", 500, 12, 1e-3, "questions about pictures, from one large shape to more small ones"),
    Stage("attention", "attention", 300, 12, 5e-4, "the same with visual attention experts (version 1.5)"),
)
"""The whole course."""


def trained_names(stage: Stage, student: Student) -> list[str]:
    """The parameters that a stage trains; all others are frozen."""
    if stage.trains == "language":
        return [name for name, _ in student.language_parameters()]
    names = [name for name, _ in student.visual_parameters()]
    if stage.trains == "vision":
        return [name for name in names if name.startswith("vision.")]
    if stage.trains == "experts":
        return [name for name in names if ".attention." not in name]
    return names


def batch_of(stage: Stage, step: int, lessons: Lessons, task: Task, language_tasks: Sequence[Task], seed: int) -> Batch:
    """What step ``step`` of a stage learns from; the same for the same arguments."""
    rng = random.Random(f"{seed}/{stage.name}/{step}")  # noqa: S311 - no secret
    if stage.name == "lookups":
        return lessons.lookups(language_tasks, rng, stage.batch)
    if stage.name == "language":
        return lessons.language(language_tasks, rng, stage.batch)
    return lessons.pictures(task, level_at(stage, step, task), rng, stage.batch)


def level_at(stage: Stage, step: int, task: Task) -> int:
    """From easy to hard: each level a tenth of the stage, then the hardest one to its end."""
    if stage.name == "attention":
        return task.LEVELS
    return min(task.LEVELS, 1 + 10 * step // stage.steps)


def loss_of(stage: Stage, student: Student, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a stage makes smaller, and the logits of the answers; None where nothing is answered."""
    if stage.name == "patches":
        return patch_loss(student, batch), None
    logits = student(batch)
    return answer_loss(logits, batch), logits


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the answers' tokens."""
    answered = batch.labels >= 0
    return F.cross_entropy(logits[answered], batch.labels[answered])


def patch_loss(student: Student, batch: Batch) -> torch.Tensor:
    """How far visual tokens are from the words for what they see; blank places count as much as all others."""
    assert batch.pixels is not None  # noqa: S101 - a stage on pictures
    assert batch.words is not None  # noqa: S101
    assert batch.weights is not None  # noqa: S101
    words = student.in_words(batch)
    far = (student.vision(batch.pixels).flatten(0, 1) - words).square().mean(1) / words.square().mean()
    blank = batch.weights.count_nonzero(1) == 1
    return (far[blank].mean() + far[~blank].mean()) / 2


def right_answers(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Bool [batch]: whether every token of the answers is the likeliest one: what greedy decoding would answer."""
    wrong = (logits.argmax(-1) != batch.labels) & (batch.labels >= 0)
    return ~wrong.any(1)


def learning_rate(stage: Stage, step: int) -> float:
    """Up over a twentieth of the stage, then down along a cosine to a hundredth."""
    warm = max(1, stage.steps // 20)
    if step < warm:
        return stage.rate * (step + 1) / warm
    done = torch.tensor((step - warm) / max(1, stage.steps - warm), dtype=torch.float64)
    return stage.rate * float(0.01 + 0.99 * (1 + torch.cos(done * torch.pi)) / 2)
