"""Questions about a few drawn pictures, and about none, as calibration reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

QUESTIONS = ("How many shapes are there?", "What color is the circle?", "Describe the image.")
COLORS = ("red", "green", "blue", "orange", "black")


def draw_picture(file: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    picture = Image.new("RGB", (448, 448), "white")
    pen = ImageDraw.Draw(picture)
    for _ in range(1 + seed % 3):
        x, y = (int(place) for place in generator.integers(20, 330, 2))
        color = COLORS[int(generator.integers(len(COLORS)))]
        (pen.ellipse if generator.random() < 0.5 else pen.rectangle)([x, y, x + 90, y + 90], fill=color)
    picture.save(file)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file: 20 questions about pictures, 4 about none; some have answers."""
    folder = tmp_path_factory.mktemp("pairs")
    entries = []
    for number in range(20):
        draw_picture(folder / f"{number}.png", number)
        entry = {"image": f"{number}.png", "prompt": QUESTIONS[number % len(QUESTIONS)]}
        entries.append(entry | ({"answer": "There are two shapes."} if number % 4 == 0 else {}))
    entries += [{"image": None, "prompt": f"{color} circle. {QUESTIONS[1]}"} for color in COLORS[:4]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "pairs.jsonl"
