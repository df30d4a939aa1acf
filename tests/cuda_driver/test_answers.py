"""The engine backend on the real PyCUDA and cuda-bindings: answers, graphs and threads.

Real are the backend with all that it says to the GPU, PyCUDA, cuda-bindings, and the numbers: ONNX Runtime computes in
the engines' place, as host functions of the stream, which captured graphs replay. Not real are the driver and TensorRT.
"""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ..runtime.backends.tensorrt.host_device import HostExecution
from ..runtime.backends.tensorrt.host_model import require_official_answer
from ..runtime.test_golden import CASES
from .driver_reports import Driver
from .models import PICTURE, QUESTION, ask
from .threads import in_threads


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_official_code(open_model: Any, one_decoder_bundle: Path, name: str) -> None:
    require_official_answer(open_model(one_decoder_bundle), name)


def test_a_picture_that_pycuda_has(open_model: Any, tiny_v1_bundle: Path, tmp_path: Path) -> None:
    """An array of PyCUDA's, as another library of the process would hand it over: it tells of itself by CUDA's array
    interface. The kernel that makes tiles of it is ours, compiled for a CPU."""
    from pycuda import gpuarray

    model = open_model(tiny_v1_bundle, kernel=tmp_path)
    picture = np.asarray(Image.open(PICTURE).convert("RGB"))
    expected = model.session(picture, QUESTION, max_tiles=2, max_new_tokens=8).text
    with model.backend.device:
        frame = gpuarray.to_gpu(picture)
        session = model.session(frame, QUESTION, max_tiles=2, max_new_tokens=8)
        assert session.text == expected
        del session, frame


def test_tokens_by_one_graph_and_one_wait_each(open_model: Any, tiny_v1_bundle: Path, driver: Driver) -> None:
    model = open_model(tiny_v1_bundle)
    captures, launches = driver.done("captures"), driver.done("launches")
    session = model.session(PICTURE, QUESTION, max_tiles=1, max_new_tokens=8)
    pieces = iter(session)
    next(pieces)
    waits, tokens = driver.done("waits"), len(session.generated_ids)
    assert session.text
    assert len(session.generated_ids) == 8
    assert driver.done("waits") - waits == 8 - tokens
    # The prompt gives the first token, the first run the second; the graph, recorded then, all others.
    assert (driver.done("captures") - captures, driver.done("launches") - launches) == (1, 6)


def test_interleaved_sessions_keep_apart(open_model: Any, tiny_v1_bundle: Path) -> None:
    model = open_model(tiny_v1_bundle)
    questions = [QUESTION, "Hello", "Where is it? " * 30]
    alone = [ask(model, question, 16) for question in questions]
    sessions = [model.session(PICTURE, question, max_tiles=1, max_new_tokens=16) for question in questions]
    streams = [iter(session) for session in sessions]
    while [piece for stream in streams if (piece := next(stream, None)) is not None]:
        pass
    assert [session.text for session in sessions] == alone


def test_sessions_in_threads(open_model: Any, tiny_v1_bundle: Path) -> None:
    """Each begins in one thread, goes on in another, and is collected there."""
    model = open_model(tiny_v1_bundle)
    questions = [f"{QUESTION} {number}" for number in range(6)]
    alone = [ask(model, question) for question in questions]
    answers: dict[str, str] = {}
    sessions = [model.session(PICTURE, question, max_tiles=1, max_new_tokens=8) for question in questions]

    def work(question: str) -> None:
        answers[question] = sessions[questions.index(question)].text
        sessions[questions.index(question)] = None
        gc.collect()

    in_threads(*(lambda question=question: work(question) for question in questions))
    assert [answers[question] for question in questions] == alone


def test_several_models_in_threads(
    open_model: Any, tiny_v1_bundle: Path, tiny_v15_bundle: Path, tiny_v1_portable_bundle: Path
) -> None:
    """Models come, answer, are asked for graphs and go, each in its thread, while others do the same."""
    bundles = (tiny_v1_bundle, tiny_v15_bundle, tiny_v1_portable_bundle)
    alone = [ask(open_model(bundle), QUESTION) for bundle in bundles]
    answers: dict[tuple[Path, int], str] = {}

    def work(bundle: Path) -> None:
        for time in range(2):
            answers[bundle, time] = ask(open_model(bundle), QUESTION)
            gc.collect()

    in_threads(*(lambda bundle=bundle: work(bundle) for bundle in bundles))
    assert [answers[bundle, time] for time in range(2) for bundle in bundles] == alone * 2


def test_a_model_that_is_collected_while_another_records(
    open_model: Any, tiny_v1_bundle: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    """In the same thread: Python collects a model wherever it stands."""
    model, others = open_model(tiny_v1_bundle), [open_model(tiny_v1_bundle)]
    expected = ask(others[0], QUESTION)
    captures, enqueue = driver.done("captures"), HostExecution.enqueue

    def collect(execution: HostExecution) -> None:
        if driver.done("captures") > captures:
            others.clear()
            gc.collect()
        enqueue(execution)

    monkeypatch.setattr(HostExecution, "enqueue", collect)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(model, QUESTION) == expected
    assert others == []
