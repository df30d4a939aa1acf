"""One session under several threads, interrupts and refusals: no text, turn or token is lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.sampling import Sampler

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURE = ROOT / "examples/shapes/pictures/p001.png"
OURS = str(ROOT / "runtime")
QUESTIONS = ("How many shapes are there?", "What color is the star?", "Describe the image.")


@pytest.fixture(scope="module")
def model(shapes_bundle: Path) -> runtime.Model:
    return runtime.load(shapes_bundle)


def in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("read", [lambda answer: answer.text, "".join], ids=["text", "pieces"])
def test_questions_of_several_threads_are_answered_one_after_the_other(
    model: runtime.Model, read: Callable[[Any], str]
) -> None:
    session = model.session(PICTURE)
    answers: dict[str, str] = {}

    def ask(index: int) -> None:
        answers[QUESTIONS[index]] = read(session.ask(QUESTIONS[index]))

    in_threads(ask, len(QUESTIONS))
    asked = [question.rpartition("\n")[2] for question, _ in session.history]
    assert sorted(asked) == sorted(QUESTIONS)
    alone = model.session(PICTURE)
    assert [answers[question] for question in asked] == [alone.ask(question).text for question in asked]
    assert session.history == alone.history


def test_threads_that_read_one_answer_read_the_same(model: runtime.Model) -> None:
    answer = model.session(PICTURE, QUESTIONS[2]).answer
    texts = [""] * 4
    in_threads(lambda index: texts.__setitem__(index, "".join(answer)), len(texts))
    assert texts == [model.session(PICTURE, QUESTIONS[2]).text] * len(texts)


def test_an_answer_whose_reader_left_is_not_computed_for_another_thread(model: runtime.Model) -> None:
    session = model.session(PICTURE, QUESTIONS[2])
    first = session.answer
    seen = next(iter(first))  # The iterator is dropped here.
    in_threads(lambda _: session.ask(QUESTIONS[0]).text, 1)
    assert first.finish_reason == "cancelled"
    assert session.history[0][1] == seen == first.text


def test_refused_question_leaves_the_unread_answer(model: runtime.Model) -> None:
    session = model.session(PICTURE, QUESTIONS[2])
    first = session.answer
    pieces = iter(first)
    seen = next(pieces)
    for question, options in (
        ("word " * 9000, {}),
        ("half a character \ud800", {}),
        (QUESTIONS[0], {"max_new_tokens": 10**6}),
        ("<image>", {}),
    ):
        with pytest.raises(runtime.PromptError):
            session.ask(question, **options)
        assert first.finish_reason is None
        assert session.answer is first
    assert seen + "".join(pieces) == model.session(PICTURE, QUESTIONS[2]).text


def interrupted(work: Callable[[], object], at: int) -> bool:
    """Runs work with a KeyboardInterrupt before instruction ``at`` of our code; returns false if there are fewer."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def instructions(work: Callable[[], object], points: int) -> Iterator[int]:
    """Yields instructions spread over a run of the work, a third of them next to each other at its beginning."""
    count = 1
    while interrupted(work, count):
        count *= 2
    low, high = count // 2, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if interrupted(work, middle) else (low, middle)
    yield from range(1, points // 3)
    yield from np.unique(np.linspace(points // 3, low, points - points // 3).astype(int)).tolist()


SAMPLED = {"do_sample": True, "temperature": 1.5, "seed": 5, "max_new_tokens": 4, "return_logits": True}


def test_an_interrupt_anywhere_loses_nothing_of_an_answer(model: runtime.Model) -> None:
    def session() -> runtime.Session:
        return model.session(prompt="Describe it.", **SAMPLED)

    whole = session()
    assert whole.text
    for at in instructions(lambda: session().text, 120):
        hurt = session()
        interrupted(lambda: hurt.text, at)  # noqa: B023 - called at once
        assert hurt.text == whole.text, at
        assert hurt.generated_ids == whole.generated_ids, at
        assert hurt.stats.generated_tokens == whole.stats.generated_tokens, at
        np.testing.assert_allclose(hurt.logits, whole.logits, rtol=0, atol=1e-4)
        assert hurt.answer.finish_reason == whole.answer.finish_reason


def test_an_interrupt_anywhere_leaves_a_session_that_answers(model: runtime.Model) -> None:
    def session() -> runtime.Session:
        begun = model.session(prompt="Describe it.", **SAMPLED)
        next(iter(begun))
        return begun

    whole = session()
    answer, history = whole.ask(QUESTIONS[0], do_sample=False).text, whole.history
    for at in instructions(lambda: session().ask(QUESTIONS[0], do_sample=False), 60):
        hurt = session()
        interrupted(lambda: hurt.ask(QUESTIONS[0], do_sample=False), at)  # noqa: B023
        if len(hurt.history) == 1:
            hurt.ask(QUESTIONS[0], do_sample=False)
        assert (hurt.text, hurt.history) == (answer, history), at


def script(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Lets the model say these tokens, whatever its logits are."""
    monkeypatch.setattr(Sampler, "next", lambda _, __, previous: ids[len(previous)])


@pytest.mark.parametrize("said", ["<IMG_CONTEXT>", "a <|im_end|> b", "[UNUSED_TOKEN_145]", "</s>"])
def test_what_a_model_wrote_is_never_markup(model: runtime.Model, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    letters = [model.tokenizer.encode(letter, add_bos=False) for letter in said]
    script(monkeypatch, [*(index for ids in letters for index in ids), model.tokenizer.id_of("<|im_end|>")])
    session = model.session(PICTURE, QUESTIONS[0])
    assert session.text == said
    monkeypatch.undo()
    before = session.prompt_ids
    answer = session.ask(QUESTIONS[1], max_new_tokens=2)
    assert answer.text is not None
    added = answer.prompt.ids[len(before) :].tolist()
    special = [token for token in added if not model.tokenizer.bytes_of(token)]
    assert special == [model.tokenizer.id_of(token) for token in ("<|im_end|>", "<|im_start|>") * 2]
    assert answer.stats.visual_tokens == 256


def test_a_special_token_ends_the_answer_when_it_is_a_stop(
    model: runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    word, end = model.tokenizer.encode("red", add_bos=False), model.tokenizer.id_of("</s>")
    script(monkeypatch, [*word, end, *word, model.tokenizer.id_of("<|im_end|>")])
    assert model.session(PICTURE, QUESTIONS[0]).text == "redred"
    session = model.session(PICTURE, QUESTIONS[0], stop=["never said", "</s>"])
    assert session.text == "red"
    assert session.generated_ids == [*word, end]
    assert session.answer.finish_reason == "stop"
