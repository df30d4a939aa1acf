"""How far the answers of one bundle are from those of another.

The first bundle answers. The second is given the same answers, and its distribution of each next token is compared.
"""

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

from calibration import CalibrationError
from calibration.data import Example
from calibration.trial.prober import Logits, Prober

KINDS = ("image", "text")
"""Questions about pictures, and about text alone. Each kind has figures of its own."""


@dataclass(frozen=True)
class Figures:
    """How far answers moved. All positions count equally.

    Attributes:
        questions: how many were asked.
        tokens: positions at which distributions were compared, the token that ends an answer included.
        same_answers: share of the questions whose greedy answer is the same.
        mean_kl: mean of KL(before ‖ after) over all positions, in nats.
        p99_kl: its 99th percentile.
        same_top1: share of the positions whose most probable token is the same.
        top5_overlap: mean share of the five most probable tokens that are the same.
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
    """The seconds that answers took.

    Attributes:
        prompts: of each prompt, from the first chunk to the logits, pictures included.
        steps: of each token decoded after the first of an answer.
    """

    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of decoding; None without steps."""
        return len(self.steps) / sum(self.steps) if self.steps else None

    @property
    def prompt_mean(self) -> float | None:
        """The mean seconds of a prompt; None without prompts."""
        return sum(self.prompts) / len(self.prompts) if self.prompts else None

    def timed(self, logits: Iterable[Any]) -> Iterator[Any]:
        """Passes logits on, and measures how long each took."""
        started = time.perf_counter()
        for index, item in enumerate(logits):
            (self.steps if index else self.prompts).append(time.perf_counter() - started)
            yield item
            started = time.perf_counter()


@dataclass(frozen=True)
class Answered:
    """A question and the answer of the first bundle.

    Attributes:
        example: the question.
        prompt: its tokens.
        ids: the tokens of the answer.
        first: how many tokens of answers come before it in the file of logits.
        text: the answer.
    """

    example: Example
    prompt: npt.NDArray[np.int64]
    ids: tuple[int, ...]
    first: int
    text: str

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return "image" if self.example.images else "text"


class Reference:
    """The answers of a bundle, and their logits in a temporary file.

    The file takes four bytes for each token of the vocabulary, for each token of the answers: with the 2B model 0.4 MB
    a token.

    Args:
        prober: asks the bundle.
        examples: the questions.
        progress: called with 1 for each example.
        folder: where the file is made.

    Raises:
        CalibrationError: the file cannot be written.
    """

    def __init__(
        self, prober: Prober, examples: Sequence[Example], progress: Callable[[int], object], folder: Path
    ) -> None:
        self.prober, self.speed, self.answered = prober, Speed(), list[Answered]()
        self._width = prober.model.bundle.manifest.model.vocab_size
        count = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".calibration-")  # noqa: SIM115 - kept open
            for example in examples:
                prompt, ids = prober.prompt(example), list[int]()
                for token, logits in self.speed.timed(prober.answer(prompt)):
                    self._file.write(np.ascontiguousarray(logits, np.float32).data)
                    ids.append(token)
                text = prober.model.tokenizer.decode(ids)
                self.answered.append(Answered(example, prompt.ids, tuple(ids), count, text))
                count += len(ids)
                progress(1)
            self._file.flush()
        except OSError as error:
            raise CalibrationError(f"logits cannot be kept in {folder}: {error.strerror}") from None
        self._logits = np.memmap(self._file, np.float32, "r", shape=(count, self._width))

    def compare(self, prober: Prober, progress: Callable[[int], object], examples: int | None = None) -> Comparison:
        """Compares the distributions of another bundle along these answers.

        Args:
            prober: asks the other bundle.
            progress: called with 1 for each example.
            examples: how many of the first examples to compare; None for all.

        Raises:
            CalibrationError: the other has another vocabulary, or reads a question as other tokens.
        """
        if prober.model.bundle.manifest.model.vocab_size != self._width:
            raise CalibrationError("the bundles have vocabularies of different sizes: they are not of one model")
        comparison = Comparison(before=self.speed)
        for answered in self.answered[:examples]:
            prompt, place = prober.prompt(answered.example), answered.example.place
            if not np.array_equal(prompt.ids, answered.prompt):
                raise CalibrationError(f"{place}: the bundles read it as different tokens: they are not of one model")
            rows = [
                position(self._logits[answered.first + index], logits, answered.ids[index])
                for index, logits in enumerate(comparison.after.timed(prober.along(prompt, answered.ids)))
            ]
            if not np.isfinite([row[0] for row in rows]).all():
                raise CalibrationError(f"{place}: the logits of {prober.model.bundle.folder} are NaN")
            comparison.answers.append((answered, rows))
            progress(1)
        return comparison


Position = tuple[float, bool, float, float]
"""KL, whether the most probable token is the same, top-5 overlap, and the logarithm of the token's probability after /
before."""


@dataclass
class Comparison:
    """What was compared.

    Attributes:
        answers: every answer, and its positions.
        before, after: the time that answers took.
    """

    answers: list[tuple[Answered, list[Position]]] = field(default_factory=list)
    before: Speed = field(default_factory=Speed)
    after: Speed = field(default_factory=Speed)

    def table(self, kind: str | None = None) -> npt.NDArray[np.float64]:
        """Returns all positions, or those of one of ``KINDS``: [positions, 4], columns as in ``Position``."""
        rows = [row for answered, positions in self.answers for row in positions if kind in (None, answered.kind)]
        return np.array(rows, np.float64).reshape(-1, 4)

    def figures(self, kind: str | None = None) -> Figures | None:
        """Returns the figures of all questions, or of one of ``KINDS``; None without questions."""
        same = [all(row[1] for row in rows) for answered, rows in self.answers if kind in (None, answered.kind)]
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


def position(before: Logits, after: Logits, token: int) -> Position:
    """Compares one position.

    Args:
        before, after: logits of both bundles, float32 [vocab].
        token: the next token of the answer.
    """
    p, q = log_softmax(before), log_softmax(after)
    top = [set(np.argpartition(logits, -5)[-5:].tolist()) for logits in (before, after)]
    return (
        max(float(np.exp(p) @ (p - q)), 0.0),
        int(before.argmax()) == int(after.argmax()),
        len(top[0] & top[1]) / 5,
        float(q[token] - p[token]),
    )


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Returns the logarithms of the probabilities, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
