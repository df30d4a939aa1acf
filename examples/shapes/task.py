"""What a task is to the scripts of this folder: scenes that can be told in words, drawn, and asked about."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

SIZE = 448
"""Side of a picture in pixels: one tile of the model, so that no pixel is resampled."""

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "black": (20, 20, 20),
    "orange": (245, 140, 30),
    "purple": (140, 50, 180),
}

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    """A question of one ``kind`` with its true answer."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Part:
    """Something in a picture, as words for the tokens that see it.

    Attributes:
        name: what it is, which takes a look at all of it.
        names: what it could have been.
        facts: what each point of it shows by itself: color and place.
        cover: draws where it is: mode L, the size of the picture, 255 where it is and 0 elsewhere.
    """

    name: str
    names: tuple[str, ...]
    facts: tuple[str, ...]
    cover: Callable[[], Image.Image]


class Scene(Protocol):
    """One scene of a task."""

    def draw(self) -> Image.Image:
        """The picture, RGB, ``SIZE`` × ``SIZE``."""

    def tell(self, rng: random.Random) -> str:
        """The scene in words, in one of several ways; every question can be answered from them."""

    def parts(self) -> list[Part]:
        """What is where in the picture."""

    def questions(self) -> Iterator[Question]:
        """Every question that the scene answers."""

    def recital(self, rng: random.Random) -> Question:
        """Everything that is to be told, in one of several orders of words; for the language part to learn from.

        What each thing is called first leads to the rest of it, which is the simplest lookup there is.
        """


class Task(Protocol):
    """A module with these names; ``STEPS`` are those of stages whose number in the course does not fit the task."""

    KINDS: tuple[str, ...]
    LEVELS: int
    STEPS: Mapping[str, int]

    def scene(self, rng: random.Random, level: int) -> Scene:
        """A scene; ``level`` counts from 1, easy, to ``LEVELS``."""


def light_background(rng: random.Random) -> Color:
    """Any light color."""
    return rng.randint(205, 255), rng.randint(205, 255), rng.randint(205, 255)


def painted(rng: random.Random, color: str) -> Color:
    """One of the many paints that a color's name stands for."""
    red, green, blue = (max(0, min(255, value + rng.randint(-12, 12))) for value in COLORS[color])
    return red, green, blue


def listed(items: list[str]) -> str:
    """``a``, ``a and b``, ``a and b and c``."""
    return " and ".join(items)


def with_article(words: str) -> str:
    """``a red star``, ``an orange star``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(words: str) -> str:
    """``A red star.``"""
    return f"{words[0].upper()}{words[1:]}."


NUMBER_WORDS = ("zero", "one", "two", "three")


def counted(number: int, thing: str) -> str:
    """``There is one shape.``"""
    return f"There {'is' if number == 1 else 'are'} {NUMBER_WORDS[number]} {thing}{'s' * (number != 1)}."
