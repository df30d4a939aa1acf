"""Sessions as apps use them: images, turns, streaming, stopping, threads and refusals."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.conversation import Conversation, Prompt, common_prefix
from runtime.generation import Sequence

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ROOT / "examples/shapes"
RECORDS = [json.loads(line) for line in (SHAPES / "answers.jsonl").read_text().splitlines()]
PICTURE = SHAPES / RECORDS[0]["image"]
QUESTION, ANSWER = RECORDS[0]["prompt"], RECORDS[0]["pytorch"]
DESCRIBE = "Describe the image."


@pytest.fixture(scope="module")
def model(shapes_bundle: Path) -> runtime.Model:
    return runtime.load(shapes_bundle)


@pytest.fixture(scope="module")
def chatty(tiny_v1_bundle: Path) -> runtime.Model:
    """Random weights: never stops by itself, so that lengths are what the caller asks for."""
    return runtime.load(tiny_v1_bundle)


@pytest.mark.parametrize("picture", sorted({record["image"] for record in RECORDS}))
def test_every_recorded_question_gets_the_answer_of_pytorch(model: runtime.Model, picture: str) -> None:
    records = [record for record in RECORDS if record["image"] == picture]
    answers = [model.session(SHAPES / picture, record["prompt"]).text for record in records]
    assert answers == [record["pytorch"] for record in records]


def test_session_by_itself(shapes_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.Session(str(PICTURE), QUESTION, bundle=shapes_bundle).text == ANSWER
    monkeypatch.setenv("MONOEDGE_BUNDLE", str(shapes_bundle))
    assert runtime.Session(PICTURE, QUESTION).text == ANSWER


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(chatty: runtime.Model, way: Callable[[object], object]) -> None:
    """A copy of a session would write into the same cache."""
    session = chatty.session(prompt="Hello")
    for item, name in ((chatty, "Model"), (session, "Session"), (session.answer, "Answer")):
        with pytest.raises(TypeError, match=f"a {name} cannot be copied or pickled: load the bundle once in each"):
            way(item)


@pytest.mark.parametrize("name", ["image_start", "image_end", "image_context"])
def test_image_tokens_that_are_none_are_refused(chatty: runtime.Model, name: str) -> None:
    """One stands for each visual token: as text of many tokens, a picture would be encoded without end."""
    template = replace(chatty.template, **{name: "no token at all"})
    with pytest.raises(runtime.BundleError, match=r"tokenizer: expected one of .*, got no token at all"):
        Conversation(template, chatty.tokenizer, chatty.image_processor.tokens_per_tile)


def test_every_form_of_an_image(model: runtime.Model) -> None:
    opened = Image.open(PICTURE).convert("RGB")
    array = np.asarray(opened)
    data = PICTURE.read_bytes()
    for form in (str(PICTURE), PICTURE, data, io.BytesIO(data), opened, array, [PICTURE], (array,)):
        assert model.session(form, QUESTION).text == ANSWER


def test_image_given_before_the_question(model: runtime.Model) -> None:
    session = model.session(PICTURE)
    assert session.ask(QUESTION).text == ANSWER
    assert session.stats.visual_tokens == 256


def test_placeholder_says_where_the_image_stands(model: runtime.Model) -> None:
    assert model.session(PICTURE, f"<image>\n{QUESTION}").text == ANSWER


def first_logits_from_nothing(model: runtime.Model, prompt: Prompt) -> np.ndarray:
    """The prompt computed whole, by caches that held nothing."""
    logits = Sequence(model.backend, model.embed).prefill(prompt, lambda: False)
    assert logits is not None
    return logits


def test_next_turn_reuses_the_cache_and_changes_nothing(model: runtime.Model) -> None:
    session = model.session(PICTURE, QUESTION, return_logits=True)
    assert session.text == ANSWER
    held = len(session.prompt_ids) + len(session.generated_ids) - 1
    answer = session.ask("What color is the triangle?")
    assert answer.text
    assert answer.stats.visual_tokens == 256
    # The answer is written as it was generated here, so that all of it is reused.
    assert answer.stats.reused_tokens == held
    assert answer.logits is not None
    fresh = first_logits_from_nothing(model, answer.prompt)
    np.testing.assert_allclose(answer.logits[0], fresh, rtol=0, atol=1e-4)


def test_second_image_on_a_kept_cache(model: runtime.Model) -> None:
    session = model.session(PICTURE, QUESTION, return_logits=True)
    assert session.text == ANSWER
    answer = session.ask(QUESTION, SHAPES / "pictures/p003.png")
    assert answer.text
    assert answer.stats.visual_tokens == 512
    assert answer.stats.reused_tokens > 256
    assert answer.logits is not None
    fresh = first_logits_from_nothing(model, answer.prompt)
    np.testing.assert_allclose(answer.logits[0], fresh, rtol=0, atol=1e-4)


def test_another_image_is_never_taken_from_the_cache(model: runtime.Model) -> None:
    """Token for token the prompts are the same; only the pictures differ."""
    conversation = Conversation(model.template, model.tokenizer, model.image_processor.tokens_per_tile)
    pictures = [PICTURE, SHAPES / "pictures/p001.png", Image.open(PICTURE)]
    first, other, same = (
        conversation.prompt([conversation.turn(QUESTION, [model.pixels(picture)])]) for picture in pictures
    )
    assert first.ids.tolist() == other.ids.tolist()
    assert common_prefix(first.keys, other.keys) == int(np.argmax(first.visual_mask))
    assert common_prefix(first.keys, same.keys) == len(first)


def test_text_alone_needs_no_vision(model: runtime.Model) -> None:
    alone = runtime.load(model.bundle.folder)
    session = alone.session(prompt="How many shapes are there?", max_new_tokens=4)
    assert session.text
    assert session.stats.visual_tokens == 0
    assert not session.visual_mask.any()
    assert set(alone.backend._opened) == {"decoder.onnx"}


def test_stop_string_ends_the_answer(model: runtime.Model) -> None:
    whole = model.session(PICTURE, DESCRIBE).text
    word = whole.split()[3]
    for stop in (word, [word, "never said"], f" {word}"):
        session = model.session(PICTURE, DESCRIBE, stop=stop)
        pieces = list(session)
        assert "".join(pieces) == session.text == whole[: whole.index(word)].rstrip()
        assert session.answer.finish_reason == "stop"


def test_max_new_tokens_ends_the_answer(chatty: runtime.Model) -> None:
    session = chatty.session(PICTURE, QUESTION, max_new_tokens=5)
    assert session.text is not None
    assert len(session.generated_ids) == session.stats.generated_tokens == 5
    assert session.answer.finish_reason == "length"


def test_finish_reason_when_the_model_ends(model: runtime.Model) -> None:
    session = model.session(PICTURE, QUESTION)
    assert session.answer.finish_reason is None
    assert session.text == ANSWER
    assert session.answer.finish_reason == "stop"
    assert session.generated_ids[-1] == model.tokenizer.id_of("<|im_end|>")


def test_sampling_is_repeatable_by_seed(chatty: runtime.Model) -> None:
    def answer(seed: int) -> list[int]:
        session = chatty.session(
            PICTURE, QUESTION, do_sample=True, temperature=2.0, top_k=0, seed=seed, max_new_tokens=12
        )
        assert session.text is not None
        return session.generated_ids

    assert answer(1) == answer(1) != answer(2)


def test_options_hold_for_the_session_and_change_for_one_turn(chatty: runtime.Model) -> None:
    session = chatty.session(PICTURE, QUESTION, max_new_tokens=3)
    assert session.text is not None
    assert session.ask("And now?", max_new_tokens=6).text is not None
    assert session.stats.generated_tokens == 6
    assert session.ask("And then?").text is not None
    assert session.stats.generated_tokens == 3


def test_cancel_from_another_thread(chatty: runtime.Model) -> None:
    session = chatty.session(PICTURE, QUESTION, max_new_tokens=2000)
    pieces = iter(session)
    next(pieces)
    canceller = threading.Thread(target=session.cancel)
    canceller.start()
    canceller.join()
    rest = list(pieces)
    assert session.answer.finish_reason == "cancelled"
    assert len(session.generated_ids) < 100
    assert len(rest) <= 2
    # The conversation goes on from what was said.
    said = session.text
    answer = session.ask("Go on.", max_new_tokens=2)
    assert answer.text is not None
    assert session.history[0][1] == said


def test_cancel_before_the_first_token(chatty: runtime.Model) -> None:
    session = chatty.session(PICTURE, QUESTION)
    session.cancel()
    assert session.text == ""
    assert session.answer.finish_reason == "cancelled"
    assert session.stats.time_to_first_token is None


def test_unread_answer_is_ended_by_the_next_question(chatty: runtime.Model) -> None:
    session = chatty.session(PICTURE, QUESTION, max_new_tokens=500)
    first = session.answer
    seen = next(iter(session))
    session.ask("Something else?", max_new_tokens=2)
    assert first.finish_reason == "cancelled"
    assert session.history[0][1].startswith(seen)
    assert len(session.history) == 2


def test_sessions_in_threads_answer_as_alone(model: runtime.Model) -> None:
    records = RECORDS[:24]
    answers: dict[int, str] = {}

    def work(first: int) -> None:
        for index in range(first, len(records), 4):
            answers[index] = model.session(SHAPES / records[index]["image"], records[index]["prompt"]).text

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(records))] == [record["pytorch"] for record in records]


def test_interleaved_sessions_keep_apart(model: runtime.Model) -> None:
    records = [record for record in RECORDS if record["prompt"] == DESCRIBE][:3]
    sessions = [model.session(SHAPES / record["image"], DESCRIBE) for record in records]
    streams = [iter(session) for session in sessions]
    texts = [""] * len(streams)
    alive = True
    while alive:
        alive = False
        for index, stream in enumerate(streams):
            piece = next(stream, None)
            if piece is not None:
                texts[index] += piece
                alive = True
    assert texts == [record["pytorch"] for record in records]


def test_caches_grow_and_are_written_in_place(chatty: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = chatty.session(PICTURE, QUESTION, max_new_tokens=400, return_logits=True)
    context = session._sequence._context
    pieces = iter(session)
    next(pieces)
    assert context.capacity == 512
    before = [cache.ctypes.data for cache in context._caches]
    while len(session.generated_ids) < 200:
        next(pieces)
    assert [cache.ctypes.data for cache in context._caches] == before
    filled = len(session.prompt_ids) + len(session.generated_ids) - 1
    assert all(cache[:, :, :filled].any(axis=(0, 1, 3)).all() for cache in context._caches)
    assert not any(cache[:, :, filled:].any() for cache in context._caches)
    assert session.text is not None
    assert context.capacity == 768
    # Growing changed nothing: the same answer with room from the start.
    monkeypatch.setattr("runtime.generation.GROWTH", 1024)
    roomy = chatty.session(PICTURE, QUESTION, max_new_tokens=400)
    assert roomy.text == session.text
    assert roomy.generated_ids == session.generated_ids


def test_no_copy_of_the_caches_per_token(shapes_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns when TensorScatter has to copy its cache; with our binding it does not."""
    import onnxruntime as ort

    model = runtime.load(shapes_bundle)
    options = ort.SessionOptions()
    options.log_severity_level = 2
    options.add_session_config_entry("session.disable_prepacking", "1")
    model.backend.decoder = ort.InferenceSession(
        shapes_bundle / "decoder.onnx", options, providers=["CPUExecutionProvider"]
    )
    capfd.readouterr()
    assert model.session(PICTURE, QUESTION).text == ANSWER
    assert "TensorScatter" not in capfd.readouterr().err

    # The control: the same step with outputs of ONNX Runtime's own.
    facts = model.bundle.manifest.model
    caches = {
        item.name: np.zeros((1, facts.num_key_value_heads, 64, facts.head_dim), np.float32)
        for item in model.backend.decoder.get_inputs()[4:]
    }
    model.backend.decoder.run(
        None,
        {
            "inputs_embeds": np.zeros((1, 1, facts.hidden_size), np.float32),
            "visual_mask": np.zeros((1, 1), bool),
            "position_ids": np.zeros((1, 1), np.int64),
            "write_indices": np.zeros(1, np.int64),
            **caches,
        },
    )
    assert "TensorScatter" in capfd.readouterr().err


def test_conversation_that_would_not_fit_is_refused_before_it_starts(chatty: runtime.Model) -> None:
    with pytest.raises(runtime.PromptError, match=r"the answer may have 8000.*exported with --max-length 8192"):
        chatty.session(PICTURE, QUESTION, max_new_tokens=8000)
    with pytest.raises(runtime.PromptError, match=r"exported with --max-length 8192"):
        chatty.session(prompt="word " * 9000)
    # Without a number, the answer gets what room there is.
    assert chatty.session(prompt="word " * 2600, max_new_tokens=1).text is not None


def test_refused_question_leaves_the_conversation(model: runtime.Model) -> None:
    session = model.session(PICTURE, QUESTION)
    assert session.text == ANSWER
    for bad in (
        lambda: session.ask("<image> <image>"),
        lambda: session.ask(QUESTION, max_new_tokens=10**6),
        lambda: session.ask(QUESTION, "nowhere.png"),
        lambda: session.ask(QUESTION, top_p=7),
        lambda: session.ask("<IMG_CONTEXT>"),
    ):
        with pytest.raises(runtime.MonoedgeError):
            bad()
        assert len(session.history) == 1
    assert session.text == ANSWER
    assert session.ask(QUESTION).text


def test_before_the_first_question(model: runtime.Model) -> None:
    session = model.session()
    with pytest.raises(runtime.PromptError, match="nothing has been asked yet"):
        list(session)
    assert session.history == []
    session.cancel()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"return_logits": 1}, "return_logits"),
        ({"temperature": 0.5}, "temperature does nothing without do_sample=True"),
        ({"stop": ["</s> red"]}, r"stop '</s> red' never comes, .*: give </s> alone"),
        ({"seed": 1}, "seed does nothing without do_sample=True"),
        ({"temperature": np.ones(2)}, "temperature must be a number"),
        ({"system": ["Be brief."]}, "expected the system message as a str, got list"),
        ({"tempreature": 1.0}, "'tempreature' is not known"),
    ],
)
def test_bad_options(model: runtime.Model, options: dict[str, object], words: str) -> None:
    with pytest.raises((runtime.OptionError, runtime.PromptError), match=words):
        model.session(PICTURE, QUESTION, **options)


def test_an_option_of_the_session_may_rest_for_one_answer(chatty: runtime.Model) -> None:
    session = chatty.session(PICTURE, QUESTION, do_sample=True, temperature=2.0, seed=np.int64(1), max_new_tokens=2)
    assert session.ask(QUESTION, do_sample=np.False_).text is not None


def test_bad_images(model: runtime.Model, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for bad in ("nowhere.png", tmp_path, tmp_path / "text.png", b"", 3, np.full((4, 4, 3), 255.0), {PICTURE}):
        with pytest.raises(runtime.ImageError):
            model.session(bad, QUESTION)  # type: ignore[arg-type]
        with pytest.raises(runtime.ImageError):
            model.session(bad)  # type: ignore[arg-type]


def test_bundle_and_model_contradict(model: runtime.Model, shapes_bundle: Path) -> None:
    with pytest.raises(runtime.OptionError, match="either bundle or model"):
        runtime.Session(PICTURE, QUESTION, model=model, bundle=shapes_bundle)
    with pytest.raises(runtime.OptionError, match=r"expected model as runtime\.load returns it, got str"):
        runtime.Session(PICTURE, QUESTION, model=str(shapes_bundle))  # type: ignore[arg-type]


def test_system_message_is_used(model: runtime.Model) -> None:
    plain = model.session(prompt="Hello", max_new_tokens=1)
    other = model.session(prompt="Hello", system="Be brief.", max_new_tokens=1)
    assert model.tokenizer.decode(other.prompt_ids).startswith("system\nBe brief.")
    assert plain.prompt_ids != other.prompt_ids


def test_stats_add_up(model: runtime.Model) -> None:
    buffer = io.BytesIO()
    Image.open(PICTURE).resize((900, 440)).save(buffer, "PNG")
    session = model.session([buffer.getvalue(), PICTURE], "<image> and <image>: describe.", max_tiles=4)
    assert session.text
    stats = session.stats
    assert stats.prompt_tokens == len(session.prompt_ids)
    assert stats.visual_tokens == 256 * (3 + 1) == session.visual_mask.sum()
    assert stats.time_to_first_token is not None
    assert stats.time_to_first_token > 0
