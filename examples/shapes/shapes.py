"""The task of this example: one to three shapes on a grid of nine places."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw
from task import COLORS, SIZE, Color, Part, Question, counted, light_background, listed, painted, sentence, with_article

SHAPES = ("circle", "square", "triangle", "star", "cross")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
KINDS = ("count", "color", "place", "shape", "describe")
LEVELS = 3
STEPS: dict[str, int] = {}

_RADII = {1: (50, 66), 2: (42, 64), 3: (36, 64)}
"""By level, the smallest and largest distance from a shape's middle to its outline, in pixels."""


@dataclass(frozen=True)
class Shape:
    """One shape: ``row`` and ``column`` count from 0; ``x``, ``y`` and ``radius`` are pixels."""

    name: str
    color: str
    row: int
    column: int
    x: int
    y: int
    radius: int
    fill: Color

    @property
    def place(self) -> str:
        """``top left`` … ``middle center`` … ``bottom right``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def looks(self) -> str:
        """``red star``."""
        return f"{self.color} {self.name}"

    @property
    def fact(self) -> str:
        """All that can be asked about it."""
        return f"{with_article(self.looks)} at the {self.place}"

    def cover(self) -> Image.Image:
        """Where it is: 255 in mode L."""
        image = Image.new("L", (SIZE, SIZE))
        self.draw(ImageDraw.Draw(image), 255)
        return image

    def draw(self, canvas: ImageDraw.ImageDraw, fill: Color | int) -> None:
        """Paints it."""
        x, y, r = self.x, self.y, self.radius
        if self.name == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif self.name == "square":
            canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        elif self.name == "triangle":
            canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
        elif self.name == "cross":
            arm = r // 3
            canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        else:
            tips = [(r if point % 2 == 0 else r * 0.42, point * math.pi / 5) for point in range(10)]
            canvas.polygon([(x + far * math.sin(a), y - far * math.cos(a)) for far, a in tips], fill=fill)


@dataclass(frozen=True)
class ShapesScene:
    """Shapes in reading order, no two of the same name, on a plain background."""

    background: Color
    shapes: tuple[Shape, ...]

    def draw(self) -> Image.Image:
        """The picture."""
        image = Image.new("RGB", (SIZE, SIZE), self.background)
        canvas = ImageDraw.Draw(image)
        for shape in self.shapes:
            shape.draw(canvas, shape.fill)
        return image

    def tell(self, rng: random.Random) -> str:
        """The scene in words."""
        shapes = rng.sample(self.shapes, len(self.shapes))
        style = rng.randrange(4)
        if style == 0:
            return f"There is {listed([shape.fact for shape in shapes])}."
        if style == 1:
            return f"The picture shows {listed([shape.fact for shape in shapes])}."
        if style == 2:
            return " ".join(sentence(f"{with_article(shape.looks)} is at the {shape.place}") for shape in shapes)
        facts = [f"The {shape.name} is {shape.color}." for shape in shapes]
        facts += [f"The {shape.name} is at the {shape.place}." for shape in shapes]
        return " ".join(rng.sample(facts, len(facts)))

    def parts(self) -> list[Part]:
        """The shapes."""
        return [
            Part(shape.name, SHAPES, (shape.color, ROWS[shape.row], COLUMNS[shape.column]), shape.cover)
            for shape in self.shapes
        ]

    def questions(self) -> Iterator[Question]:
        """Every question about the scene."""
        yield Question("count", "How many shapes are there?", counted(len(self.shapes), "shape"))
        for shape in self.shapes:
            yield Question("color", f"What color is the {shape.name}?", f"The {shape.name} is {shape.color}.")
            yield Question("place", f"Where is the {shape.name}?", f"The {shape.name} is {shape.place}.")
            yield Question(
                "shape", f"Which shape is at the {shape.place}?", f"{with_article(shape.looks).capitalize()}."
            )
        answer = f"There is {listed([shape.fact for shape in self.shapes])}."
        yield Question("describe", "Describe the image.", answer)

    def recital(self, rng: random.Random) -> Question:
        """The shapes in any order, each by its name, color or place."""
        key = rng.choice(("shape", "color", "place"))
        shapes = rng.sample(self.shapes, len(self.shapes))
        words = {
            "shape": [f"{shape.name} {shape.color} {shape.place}" for shape in shapes],
            "color": [f"{shape.color} {shape.place} {shape.name}" for shape in shapes],
            "place": [f"{shape.place} {shape.color} {shape.name}" for shape in shapes],
        }
        return Question("recital", f"List them by {key}.", f" {', '.join(words[key])}.")


def scene(rng: random.Random, level: int = LEVELS) -> ShapesScene:
    """Up to ``level`` shapes; the easier the level, the larger they are."""
    background = light_background(rng)
    number = rng.randint(1, level)
    shapes = []
    cells = rng.sample(range(9), number)
    for cell, name in zip(cells, rng.sample(SHAPES, number), strict=True):
        row, column = divmod(cell, 3)
        color = rng.choice(list(COLORS))
        x, y = (75 + 149 * index + rng.randint(-12, 12) for index in (column, row))
        shapes.append(Shape(name, color, row, column, x, y, rng.randint(*_RADII[level]), painted(rng, color)))
    return ShapesScene(background, tuple(sorted(shapes, key=lambda shape: (shape.row, shape.column))))
