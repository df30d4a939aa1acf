"""Images on their way into a conversation: as people see them or as stored."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import runtime
from tests.runtime.images.pictures import encoded, noise

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def model(tiny_v1_bundle: Path) -> runtime.Model:
    return runtime.load(tiny_v1_bundle)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """As a phone writes a portrait: pixels lie on their side, and EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.fromarray(noise(1000, 400)), "JPEG", exif=exif))
    return tmp_path / "photo.jpg"


def names(session: runtime.Session) -> list[str]:
    return [image.name for image in session.answer.prompt.images]


# ---- as seen, as stored ----------------------------------------------------------------------------------------------


def test_a_phones_portrait_is_read_upright(model: runtime.Model, photo: Path) -> None:
    upright = np.asarray(ImageOps.exif_transpose(Image.open(photo)))
    assert upright.shape == (1000, 400, 3)
    expected = names(model.session(upright, QUESTION))
    data = photo.read_bytes()
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    for form in (photo, str(photo), data, bytearray(data), io.BytesIO(data), uri, Image.open(photo)):
        assert names(model.session(form, QUESTION)) == expected


def test_stored_pixels_may_be_asked_for(model: runtime.Model, photo: Path) -> None:
    sideways = names(model.session(np.asarray(Image.open(photo)), QUESTION))
    upright = names(model.session(photo, QUESTION))
    assert sideways != upright
    assert names(model.session(photo, QUESTION, as_stored=True)) == sideways
    waiting = model.session(photo, as_stored=True)
    waiting.ask(QUESTION)
    assert names(waiting) == sideways
    for_one_turn = model.session(photo, QUESTION)
    for_one_turn.ask(QUESTION, photo, as_stored=True)
    assert names(for_one_turn) == upright + sideways
    assert [model.pixels(photo, as_stored=flag).name for flag in (False, True)] == upright + sideways


@pytest.mark.parametrize("option", [{"as_stored": 1}, {"max_pixels": 0}, {"max_pixels": "many"}])
def test_bad_options_are_refused(model: runtime.Model, photo: Path, option: dict[str, object]) -> None:
    with pytest.raises(runtime.OptionError, match=next(iter(option))):
        model.session(photo, QUESTION, **option)


def test_an_app_may_lower_the_limit_of_pixels(model: runtime.Model, photo: Path) -> None:
    for ask in (
        lambda: model.session(photo, QUESTION, max_pixels=399_999),
        lambda: model.session(photo, max_pixels=399_999),
        lambda: model.session().ask(QUESTION, photo, max_pixels=399_999),
    ):
        with pytest.raises(runtime.ImageError, match="1000×400 pixels, more than the 399999 allowed"):
            ask()
    assert names(model.session(photo, QUESTION, max_pixels=400_000))


def test_a_bad_image_is_reported_before_the_question(model: runtime.Model, photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:-20_000])
    with pytest.raises(runtime.ImageError, match="truncated"):
        model.session(photo)


def test_an_image_given_before_the_question_may_be_written_again(model: runtime.Model) -> None:
    array = noise(30, 20)
    expected = names(model.session(array.copy(), QUESTION))
    session = model.session(array)
    array[:] = 0
    session.ask(QUESTION)
    assert names(session) == expected
