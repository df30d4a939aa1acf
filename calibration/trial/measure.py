"""How far the answers of one bundle are from those of another: token by token, along the answers of the first."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.data import Example
from calibration.errors import CalibrationError
from calibration.trial.prober import Logits, Prober

KINDS = ("image", "text")
"""Questions about pictures, and about text alone; they are told of separately."""


@dataclass(frozen=True)
class Figures:
    """How far answers moved; all positions count equally.

    Attributes:
        questions: how many were asked.
        tokens: positions at which distributions were compared, the token that ends an answer included.
        same_answers: part of the questions whose whole answer, greedily, is the same.
        mean_kl: mean of KL(before ‖ after) over all positions, in nats.
        p99_kl: its 99th percentile.
        same_top1: part of the positions whose most probable token is the same.
        top5_overlap: mean part of the five most probable tokens that are the same.
        perplexity_ratio: perplexity of the answers after, over that before.
    """

    questions: int
    tokens: int
    same_answers: float
    mean_kl: float
    p99_kl: float
    same_top1: float
    top5_overlap: float
    perplexity_ratio: float


@dataclass
class Speed:
    """Time that answers took.

    Attributes:
        prompts: how many prompts were read.
        prompt_seconds: from the first piece of a prompt to its logits, pictures included, summed up.
        steps: tokens decoded after the first of each answer.
        step_seconds: summed up.
    """

    prompts: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    step_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of decoding; None without steps."""
        return self.steps / self.step_seconds if self.steps else None

    @property
    def prompt_mean(self) -> float | None:
        """Mean seconds of a prompt; None without."""
        return self.prompt_seconds / self.prompts if self.prompts else None

    def timed(self, logits: Iterable[Any]) -> Iterator[Any]:
        """The same, measured."""
        started = time.perf_counter()
        for index, item in enumerate(logits):
            took = time.perf_counter() - started
            if index:
                self.steps, self.step_seconds = self.steps + 1, self.step_seconds + took
            else:
                self.prompts, self.prompt_seconds = self.prompts + 1, self.prompt_seconds + took
            yield item
            started = time.perf_counter()


@dataclass(frozen=True)
class Answered:
    """A question and the answer that is compared along.

    Attributes:
        example: the question.
        prompt: its tokens.
        ids: those of the answer.
        first: where its logits begin, counted in tokens.
    """

    example: Example
    prompt: npt.NDArray[np.int64]
    ids: tuple[int, ...]
    first: int


class Reference:
    """The answers of a bundle, and the logits that gave them, in a temporary file that nobody else sees.

    Its size is four bytes for each answer token and token of the vocabulary: 0.4 MB a token with that of the 2B model.

    Args:
        prober: the bundle.
        examples: what is asked.
        progress: called with 1 for each example.
        folder: where the file is made, on a disk with room.

    Raises:
        CalibrationError: the file cannot be written.
    """

    def __init__(
        self, prober: Prober, examples: Sequence[Example], progress: Callable[[int], object], folder: Path
    ) -> None:
        self.speed, self.answered = Speed(), list[Answered]()
        self.tokenizer = prober.model.tokenizer
        self._width = prober.model.bundle.manifest.model.vocab_size
        count = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".calibration-")  # noqa: SIM115 - kept open
            for example in examples:
                prompt, ids = prober.prompt(example), list[int]()
                for token, logits in self.speed.timed(prober.answer(prompt)):
                    self._file.write(np.ascontiguousarray(logits, np.float32).data)
                    ids.append(token)
                self.answered.append(Answered(example, prompt.ids, tuple(ids), count))
                count += len(ids)
                progress(1)
            self._file.flush()
        except OSError as error:
            raise CalibrationError(f"logits cannot be kept in {folder}: {error.strerror}") from None
        self._logits = np.memmap(self._file, np.float32, "r", shape=(count, self._width))

    def compare(
        self, prober: Prober, progress: Callable[[int], object], examples: int | None = None
    ) -> tuple[Comparison, Speed]:
        """Leads another bundle along these answers.

        Args:
            prober: the other bundle.
            progress: called with 1 for each example.
            examples: only the first so many.

        Raises:
            CalibrationError: the other has another vocabulary, or reads a question as other tokens.
        """
        if prober.model.bundle.manifest.model.vocab_size != self._width:
            raise CalibrationError("the bundles have vocabularies of different sizes: they are not of one model")
        comparison, speed = Comparison(), Speed()
        for answered in self.answered[:examples]:
            prompt = prober.prompt(answered.example)
            if not np.array_equal(prompt.ids, answered.prompt):
                raise CalibrationError(
                    f"{answered.example.place}: the bundles read it as different tokens: they are not of one model"
                )
            rows = [
                position(self._logits[answered.first + index], logits, answered.ids[index])
                for index, logits in enumerate(speed.timed(prober.along(prompt, answered.ids)))
            ]
            if not np.isfinite([row[0] for row in rows]).all():
                raise CalibrationError(f"{answered.example.place}: the logits of {prober.model.bundle.folder} are NaN")
            comparison.answers.append((answered, rows))
            progress(1)
        return comparison, speed


Position = tuple[float, bool, float, float]
"""KL, whether the most probable token is the same, top-5 overlap, and the logarithm of probability after / before."""


@dataclass
class Comparison:
    """The positions of all answers."""

    answers: list[tuple[Answered, list[Position]]] = field(default_factory=list)

    def table(self, kind: str | None = None) -> npt.NDArray[np.float64]:
        """All positions, or those of one of ``KINDS``, in the order of ``Position``: [positions, 4]."""
        rows = [row for answered, positions in self.answers for row in positions if kind in (None, kind_of(answered))]
        return np.array(rows, np.float64).reshape(-1, 4)

    def figures(self, kind: str | None = None) -> Figures | None:
        """Over all questions, or those of one of ``KINDS``; None where there are none."""
        same = [all(row[1] for row in rows) for answered, rows in self.answers if kind in (None, kind_of(answered))]
        if not same:
            return None
        table = self.table(kind)
        return Figures(
            questions=len(same),
            tokens=len(table),
            same_answers=float(np.mean(same)),
            mean_kl=float(table[:, 0].mean()),
            p99_kl=float(np.percentile(table[:, 0], 99)),
            same_top1=float(table[:, 1].mean()),
            top5_overlap=float(table[:, 2].mean()),
            perplexity_ratio=math.exp(-float(table[:, 3].mean())),
        )


def kind_of(answered: Answered) -> str:
    """One of ``KINDS``."""
    return "image" if answered.example.images else "text"


def position(before: Logits, after: Logits, token: int) -> Position:
    """What is compared at one position: float32 logits [vocab] of both, and the token that was chosen before."""
    p, q = log_softmax(before), log_softmax(after)
    top = [set(np.argpartition(logits, -5)[-5:].tolist()) for logits in (before, after)]
    return (
        max(float(np.exp(p) @ (p - q)), 0.0),
        int(before.argmax()) == int(after.argmax()),
        len(top[0] & top[1]) / 5,
        float(q[token] - p[token]),
    )


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
