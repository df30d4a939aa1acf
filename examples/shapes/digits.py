"""A second task on the same language part: a number of one to three digits on a seven-segment display."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw
from task import COLORS, SIZE, Color, Part, Question, counted, light_background, painted, with_article

KINDS = ("number", "digit", "count", "color")
LEVELS = 3
STEPS = {"patches": 800, "pictures": 2000}
"""A small window on a digit tells little of which one it is, so that visual experts have more to find out together."""

_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
"""By digit, its segments: a top, b and c right, d bottom, e and f left, g middle, as datasheets letter them."""

_WIDE = {1: (48, 54), 2: (46, 54), 3: (44, 54)}
"""By level, the smallest and largest half width of a digit, in pixels; it is nearly twice as high as wide."""

_PLACES = {1: ("center",), 2: ("left", "right"), 3: ("left", "center", "right")}
_MIDDLES = {"left": 75, "center": 224, "right": 373}


@dataclass(frozen=True)
class DigitsScene:
    """A number; ``left`` and ``top`` are the pixels by which it is off its place, ``half`` half a digit's width."""

    background: Color
    digits: tuple[int, ...]
    color: str
    fill: Color
    half: int
    left: int
    top: int

    @property
    def _placed(self) -> list[tuple[str, int]]:
        return list(zip(_PLACES[len(self.digits)], self.digits, strict=True))

    @property
    def number(self) -> str:
        """As it is read."""
        return "".join(map(str, self.digits))

    def draw(self) -> Image.Image:
        """The picture."""
        image = Image.new("RGB", (SIZE, SIZE), self.background)
        canvas = ImageDraw.Draw(image)
        for place, digit in self._placed:
            self._draw_digit(canvas, _MIDDLES[place] + self.left, SIZE // 2 + self.top, _SEGMENTS[digit])
        return image

    def _draw_digit(self, canvas: ImageDraw.ImageDraw, x: int, y: int, segments: str) -> None:
        half, tall, thick = self.half, self.half * 9 // 5, self.half // 5
        lines = {
            "a": (-half, -tall, half, -tall),
            "b": (half, -tall, half, 0),
            "c": (half, 0, half, tall),
            "d": (-half, tall, half, tall),
            "e": (-half, 0, -half, tall),
            "f": (-half, -tall, -half, 0),
            "g": (-half, 0, half, 0),
        }
        for segment in segments:
            x0, y0, x1, y1 = lines[segment]
            canvas.rectangle((x + x0 - thick, y + y0 - thick, x + x1 + thick, y + y1 + thick), fill=self.fill)

    def tell(self, rng: random.Random) -> str:
        """The scene in words."""
        style = rng.randrange(3)
        if style == 0:
            return f"There is {with_article(self.color)} number {self.number}."
        if style == 1:
            return f"The number is {self.number}. The number is {self.color}."
        placed = rng.sample(self._placed, len(self.digits))
        return " ".join(
            f"{with_article(self.color).capitalize()} {digit} is at the {place}." for place, digit in placed
        )

    def parts(self) -> list[Part]:
        """The digits, each with the segments that are off: they tell what it is as much as the others."""
        return [
            Part(str(digit), tuple("0123456789"), (self.color, place), functools.partial(self._cover, place))
            for place, digit in self._placed
        ]

    def _cover(self, place: str) -> Image.Image:
        cover = Image.new("L", (SIZE, SIZE))
        x, y, wide, tall = _MIDDLES[place] + self.left, SIZE // 2 + self.top, self.half * 6 // 5, self.half * 2
        ImageDraw.Draw(cover).rectangle((x - wide, y - tall, x + wide, y + tall), fill=255)
        return cover

    def questions(self) -> Iterator[Question]:
        """Every question about the scene."""
        yield Question("number", "What number is it?", f"The number is {self.number}.")
        for place, digit in self._placed:
            yield Question("digit", f"Which digit is at the {place}?", f"The digit is {digit}.")
        yield Question("count", "How many digits are there?", counted(len(self.digits), "digit"))
        yield Question("color", "What color is the number?", f"The number is {self.color}.")

    def recital(self, rng: random.Random) -> Question:
        """The digits in any order, each by its place or by what it is."""
        key = rng.choice(("digit", "place"))
        placed = rng.sample(self._placed, len(self.digits))
        words = [f"{digit} {self.color} {place}" if key == "digit" else f"{place} {digit}" for place, digit in placed]
        return Question("recital", f"List them by {key}.", f" {', '.join(words)}.")


def scene(rng: random.Random, level: int = LEVELS) -> DigitsScene:
    """A number of up to ``level`` digits; the easier the level, the larger they are."""
    background, color = light_background(rng), rng.choice(list(COLORS))
    digits = tuple(rng.randrange(10) for _ in range(rng.randint(1, level)))
    half, left, top = rng.randint(*_WIDE[level]), rng.randint(-8, 8), rng.randint(-14, 14)
    return DigitsScene(background, digits, color, painted(rng, color), half, left, top)
