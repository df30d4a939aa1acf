"""The runtime against the official implementation: the recorded cases, answered through sessions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import runtime

GOLDEN = Path(__file__).resolve().parent.parent / "data/golden"
CASES = ["one_tile", "text_only", "two_images", "two_images_repo", "wide_tiles6", "wide_tiles12", "two_turn"]

LOGITS_TOLERANCE = 1e-3
"""Greatest absolute difference of logits, whose standard deviation is about 2; seen: below 2e-5."""


def load_case(version: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = GOLDEN / version
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def turn_tensors(tensors: dict[str, np.ndarray], turn: int, turns: int) -> dict[str, np.ndarray]:
    prefix = f"turn{turn}." if turns > 1 else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def model(golden_bundle: Path) -> runtime.Model:
    return runtime.load(golden_bundle, verify=True)


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_official_code(model: runtime.Model, name: str) -> None:
    case, tensors = load_case(model.bundle.folder.name, name)
    images = [GOLDEN / "images" / file for file, _ in case["images"]]
    max_tiles = case["images"][0][1] if images else None
    digests = [hashlib.sha256(model.image_processor(image, max_tiles).tobytes()).hexdigest() for image in images]
    assert digests == case["pixel_values_sha256"]

    session = model.session(images, case["questions"][0], max_tiles=max_tiles, max_new_tokens=32, return_logits=True)
    for turn, recorded in enumerate(case["turns"]):
        if turn:
            before = len(session.prompt_ids) + len(session.generated_ids)
            session.ask(case["questions"][turn])
        expected = turn_tensors(tensors, turn, len(case["turns"]))
        assert session.prompt_ids == expected["input_ids"].tolist()
        assert session.visual_mask.tolist() == expected["visual_token_mask"].astype(bool).tolist()

        assert session.text == recorded["response"].strip()
        assert session.generated_ids == expected["generated_ids"].tolist()
        assert session.logits is not None
        np.testing.assert_allclose(session.logits[0], expected["prefill_last_logits"], rtol=0, atol=LOGITS_TOLERANCE)
        np.testing.assert_allclose(session.logits, expected["step_logits"], rtol=0, atol=LOGITS_TOLERANCE)
        assert session.stats.prompt_tokens == len(expected["input_ids"])
        assert session.stats.visual_tokens == expected["visual_token_mask"].sum()
        if turn:
            # The image and everything before the first token that was written otherwise than generated.
            assert 278 <= session.stats.reused_tokens < before


def test_streamed_pieces_are_the_text(model: runtime.Model) -> None:
    session = model.session(GOLDEN / "images/portrait.png", "What is written here?", max_tiles=1, max_new_tokens=32)
    pieces = list(session)
    assert len(pieces) > 5
    assert "".join(pieces) == session.text
    assert list(session) == pieces


@pytest.mark.parametrize("chunk", [1, 7, 100, 4096])
def test_prefill_in_chunks_is_the_same(model: runtime.Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tensors = load_case(model.bundle.folder.name, "two_images")
    monkeypatch.setattr(model.backend, "chunk", chunk)
    images = [GOLDEN / "images" / file for file, _ in case["images"]]
    session = model.session(images, case["questions"][0], max_tiles=1, max_new_tokens=2, return_logits=True)
    assert session.text is not None
    assert session.logits is not None
    np.testing.assert_allclose(session.logits, tensors["step_logits"][:2], rtol=0, atol=LOGITS_TOLERANCE)
