"""Images on their way into a conversation: as people see them or as stored, and only if they fit."""

from __future__ import annotations

import base64
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import runtime
from tests.runtime.images.pictures import encoded, header_only, noise

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


# ---- whether they fit ------------------------------------------------------------------------------------------------


def peak_while_refused(ask: Callable[[], object]) -> int:
    """Most bytes taken until images were refused as too many."""
    tracemalloc.start()
    try:
        with pytest.raises(runtime.PromptError, match=r"images alone have at least \d+ tokens, but .*max_tiles"):
            ask()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_images_that_do_not_fit_are_refused_before_a_pixel_is_computed(model: runtime.Model) -> None:
    """Nothing could be decoded of these: the file has a size and no pixels."""
    frame = header_only(1280, 720)
    with pytest.raises(runtime.ImageError, match="cannot be decoded"):
        model.session(frame, QUESTION)
    assert peak_while_refused(lambda: model.session([frame] * 100, QUESTION)) < 10e6
    session = model.session(prompt=QUESTION, max_new_tokens=1)
    assert session.text is not None
    assert peak_while_refused(lambda: session.ask(QUESTION, [frame] * 100)) < 10e6
    assert len(session.history) == 1


def test_frames_and_strips_that_do_not_fit_take_no_memory(model: runtime.Model) -> None:
    frames = [noise(1280, 720)] * 32
    assert peak_while_refused(lambda: model.session(frames, QUESTION)) < 10e6
    strip = noise(5000, 1)
    assert peak_while_refused(lambda: model.session(strip, QUESTION, max_tiles=1000)) < 10e6


def test_as_many_images_as_fit_are_taken(model: runtime.Model) -> None:
    most = model.max_length // model.image_processor.tokens_per_tile
    small = noise(20, 20)
    with pytest.raises(runtime.PromptError, match="images alone"):
        model.session([small] * (most + 1), QUESTION)
    with pytest.raises(runtime.PromptError, match="the conversation has"):
        model.session([small] * most, QUESTION)
    fitting = most - 3  # their labels take room too
    assert len(names(model.session([small] * fitting, QUESTION, max_new_tokens=1))) == fitting


@pytest.mark.parametrize("max_tiles", [1001, 10**6])
def test_max_tiles_has_an_upper_bound(model: runtime.Model, max_tiles: int) -> None:
    with pytest.raises(runtime.OptionError, match="max_tiles must be at most 1000"):
        model.session(noise(5000, 1), QUESTION, max_tiles=max_tiles)
