"""Scenes as conversations to learn from: told, as words on the places of visual tokens, or as pictures."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from student import Batch
from task import SIZE, Part, Question, Scene, Task

from runtime.images.preprocess import ImageProcessor
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

BLANK = "-"
"""The word for where there is nothing."""

_COVERED = 25
"""Of 255: how much of a visual token's square a part has to cover to be what the token sees."""

Form = Literal["told", "words", "picture"]
Words = list[tuple[str, float]]
"""What one place shows: words, and how much of each."""


@dataclass(frozen=True)
class Example:
    """A conversation about one scene: token ids, labels, where something is seen, and what."""

    ids: list[int]
    labels: list[int]
    seen_from: int
    words: list[Words]
    pixels: np.ndarray | None


class Lessons:
    """Makes batches; the same arguments give the same batch.

    Args:
        tokenizer: the student's.
        template: the student's chat template.
        processor: how the student wants its pictures.
        turns: questions in one conversation, at most.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, processor: ImageProcessor, turns: int) -> None:
        self.tokenizer, self.template, self.processor, self.turns = tokenizer, template, processor, turns
        self._side = round(processor.tokens_per_tile**0.5)
        self._context = tokenizer.id_of(template.image_context)
        self._after_image = tokenizer.id_of(template.image_end)
        self._encoded = functools.lru_cache(maxsize=1 << 16)(self._encode)
        self._word_id = functools.lru_cache(maxsize=None)(lambda word: tokenizer.encode(f" {word}", add_bos=False)[-1])

    def lookups(self, tasks: Sequence[Task], rng: random.Random, size: int) -> Batch:
        """One question about a scene of several parts, each told, or in one place and free of doubt."""
        examples = []
        told = rng.random() < 0.25
        while len(examples) < size:
            task = rng.choice(tasks)
            scene = task.scene(rng, task.LEVELS)
            parts = scene.parts()
            if len(parts) > 1:
                question = scene.recital(rng) if rng.random() < 0.5 else rng.choice(list(scene.questions()))
                if told:
                    question = told_first(scene, question, rng)
                words = [] if told else [_seen(part, None) for part in parts]
                examples.append(self._conversation(scene, [question], "told" if told else "words", words, system=""))
        return self.collate(examples)

    def language(self, tasks: Sequence[Task], rng: random.Random, size: int) -> Batch:
        """Scenes without a picture: a batch of told ones, or one of words on the places of visual tokens."""
        if rng.random() < 0.3:
            examples = [self._example(self._scene(tasks, rng), "told", rng) for _ in range(size)]
        else:
            # A part of the places is enough to learn how to look things up, and cheaper.
            share = 1.0 if rng.random() < 0.12 else rng.choice((0.06, 0.1, 0.15, 0.25))
            examples = [self._example(self._scene(tasks, rng), "words", rng, share) for _ in range(size)]
        return self.collate(examples)

    def pictures(self, task: Task, level: int, rng: random.Random, size: int) -> Batch:
        """Drawn scenes of one task, with words for every visual token beside them."""
        return self.collate([self._example(task.scene(rng, level), "picture", rng) for _ in range(size)])

    def single(self, scene: Scene, question: Question) -> Example:
        """A drawn scene and one question, as the runtime asks it."""
        return self._conversation(scene, [question], "picture", [[]] * self._side**2)

    # ---- scenes to conversations -------------------------------------------------------------------------

    def _scene(self, tasks: Sequence[Task], rng: random.Random) -> Scene:
        task = rng.choice(tasks)
        return task.scene(rng, rng.choice((task.LEVELS, rng.randint(1, task.LEVELS))))

    def _example(self, scene: Scene, form: Form, rng: random.Random, share: float = 1.0) -> Example:
        every = list(scene.questions())
        questions = rng.sample(every, min(self.turns, len(every)))
        # A description is the hardest question, and the one that teaches most.
        for whole in every:
            if whole.kind == "describe" and whole not in questions and rng.random() < 0.4:
                questions[-1] = whole
        if form == "words" and rng.random() < 0.15:
            questions[0] = scene.recital(rng)
        # A description answers whatever follows, so it mostly comes last.
        questions.sort(key=lambda question: question.kind == "describe" and rng.random() < 0.7)
        if form == "told":
            first = told_first(scene, questions[0], rng)
            return self._conversation(scene, [first, *questions[1:]], form, [])
        owners, words = self.places(scene.parts(), rng if form == "words" and rng.random() < 0.8 else None)
        if share < 1:
            kept = set(rng.sample(range(len(words)), round(share * len(words))))
            for owner in set(owners) - {None}:  # of each part something stays
                own = [place for place, its in enumerate(owners) if its == owner]
                kept |= set(rng.sample(own, min(2, len(own))))
            words = [words[place] for place in sorted(kept)]
        return self._conversation(scene, questions, form, words)

    def places(self, parts: list[Part], noise: random.Random | None) -> tuple[list[int | None], list[Words]]:
        """What each visual token of a picture shows, in words.

        Args:
            parts: of the scene.
            noise: makes places doubt what they see a part of, as a look through a small window does; None for the
                truth.

        Returns:
            for each place the part that it shows, None where there is nothing, and its words.
        """
        covers = np.stack([np.asarray(part.cover().reduce(SIZE // self._side), np.int32) for part in parts])
        best, most = covers.argmax(0).flatten(), covers.max(0).flatten()
        owners = [int(index) if covered >= _COVERED else None for index, covered in zip(best, most, strict=True)]
        return owners, [[(BLANK, 1.0)] if owner is None else _seen(parts[owner], noise) for owner in owners]

    def _conversation(
        self, scene: Scene, questions: list[Question], form: Form, words: list[Words], system: str | None = None
    ) -> Example:
        ids = list(self._encoded(self.template.render([], system), True))
        labels = [-100] * len(ids)
        seen_from = 0
        for number, question in enumerate(questions):
            with_image = number == 0 and form != "told"
            asked = list(self._encoded(self._question(question.prompt, with_image)))
            if with_image:
                seen_from = len(ids) + asked.index(self._after_image)
                asked[seen_from - len(ids) : seen_from - len(ids)] = [self._context] * len(words)
            answer = self._encoded(self.template.assistant_prefix + question.answer + self.template.separator)
            prefix = self._encoded(self.template.assistant_prefix)
            if answer[: len(prefix)] != prefix:
                raise AssertionError("an answer is not cut where it begins")
            ids += [*asked, *answer]
            labels += [-100] * (len(asked) + len(prefix)) + list(answer[len(prefix) :])
        # The label of a token is what follows it.
        pixels = self.processor(scene.draw(), 1)[0] if form == "picture" else None
        return Example(ids, [*labels[1:], -100], seen_from, words, pixels)

    def _question(self, prompt: str, with_image: bool) -> str:
        image = f"{self.template.image_start}{self.template.image_end}\n" if with_image else ""
        return self.template.user_prefix + image + prompt + self.template.separator

    def _encode(self, text: str, add_bos: bool = False) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_bos))

    # ---- conversations to a batch ------------------------------------------------------------------------

    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples to one length."""
        length = max(len(example.ids) for example in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        seen = torch.zeros_like(ids, dtype=torch.bool)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, : len(example.ids)] = torch.tensor(example.labels)
            seen[row, example.seen_from : example.seen_from + len(example.words)] = True
        places = [place for example in examples for place in example.words]
        wide = max((len(place) for place in places), default=0)
        words = weights = pixels = None
        if wide:
            words = torch.tensor(
                [[self._word_id(word) for word, _ in place] + [0] * (wide - len(place)) for place in places]
            )
            weights = torch.tensor([[share for _, share in place] + [0.0] * (wide - len(place)) for place in places])
        if examples[0].pixels is not None:
            pixels = torch.from_numpy(np.stack([example.pixels for example in examples if example.pixels is not None]))
        return Batch(ids, labels, seen, pixels, words, weights)


def told_first(scene: Scene, question: Question, rng: random.Random) -> Question:
    """The question behind the scene in words."""
    return Question(question.kind, f"{scene.tell(rng)}\n{question.prompt}", question.answer)


def _seen(part: Part, noise: random.Random | None) -> Words:
    """What one place shows of a part."""
    if noise is None:
        return [*((fact, 1.0) for fact in part.facts), (part.name, 1.0)]
    clear = noise.uniform(0.5, 1)
    facts = [(fact, clear) for fact in part.facts]
    others = [name for name in part.names if name != part.name]
    if noise.random() < 0.4:
        possible = [part.name, *noise.sample(others, noise.randint(1, 3))]
        return [*facts, *((name, clear / len(possible)) for name in possible), (BLANK, 1 - clear)]
    sure = clear * noise.uniform(0.5, 1)
    return [*facts, (part.name, sure), (noise.choice(others), clear - sure), (BLANK, 1 - clear)]
