"""The engine backend on the real PyCUDA and cuda-bindings: answers, graphs, threads, and what goes wrong.

Real are the backend with all that it says to the GPU, PyCUDA, cuda-bindings, and the numbers: ONNX Runtime computes in
the engines' place, as host functions of the stream, which captured graphs replay. Not real are the driver and TensorRT.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime

from ..runtime.backends.tensorrt.host_device import HostExecution
from ..runtime.backends.tensorrt.host_model import open_on_engines, require_official_answer
from ..runtime.test_golden import CASES, GOLDEN
from .driver_reports import Driver

PICTURE = GOLDEN / "images/portrait.png"
QUESTION = "What is written here?"
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_functions: list[Any] = []
"""All that were enqueued in this process: graphs and the queue have their addresses only."""


class Executor:
    """Lets engines compute in the stream of a device."""

    def __init__(self, stream: int, failures: list[BaseException]) -> None:
        self._driver, self._stream, self._failures = Driver(), stream, failures

    def require_entered(self) -> None:
        """The driver says it."""

    def enqueue(self, work: Callable[[], None]) -> None:
        def run(_: object) -> None:
            try:
                work()
            except BaseException as error:  # which the driver's C could not pass on
                self._failures.append(error)

        _functions.append(_FUNCTION(run))
        status = self._driver.library.cuLaunchHostFunc(ctypes.c_void_p(self._stream), _functions[-1], None)
        assert status == 0, status

    def at(self, address: int, size: int) -> np.ndarray:
        assert self._driver.is_allocated(address, size), f"{size} bytes at {address} are not allocated"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@pytest.fixture
def open_model() -> Iterator[Callable[..., runtime.Model]]:
    """Opens a bundle; what engines found wrong while they computed fails the test at its end."""
    from runtime.backends.cuda.pycuda import PyCudaDevice

    failures: list[BaseException] = []

    def open_model(bundle: Path, **options: Any) -> runtime.Model:
        device = PyCudaDevice()
        return open_on_engines(bundle, device, Executor(device.stream, failures), **options)

    yield open_model
    _functions.clear()
    assert failures == []


def in_threads(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def ask(model: runtime.Model, question: str, tokens: int = 8, picture: Path | None = PICTURE) -> str:
    session = model.session(picture or (), question, max_tiles=1, max_new_tokens=tokens)
    text = session.text
    assert text is not None
    return text


# Answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_official_code(open_model: Any, one_decoder_bundle: Path, name: str) -> None:
    require_official_answer(open_model(one_decoder_bundle), name)


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


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_is_told_and_done_without(
    open_model: Any, tiny_v1_bundle: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    model = open_model(tiny_v1_bundle)
    expected, captures, enqueue = ask(open_model(tiny_v1_bundle), QUESTION), [], HostExecution.enqueue
    before, launches = driver.done("captures"), driver.done("launches")

    def allocate(execution: HostExecution) -> None:
        if driver.done("captures") > before and not captures:
            captures.append(driver.library.cuMemAlloc_v2(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(10)))
        enqueue(execution)

    monkeypatch.setattr(HostExecution, "enqueue", allocate)
    with pytest.warns(UserWarning, match=r"without a CUDA graph, which is slower: .*STREAM_CAPTURE_INVALIDATED"):
        assert ask(model, QUESTION) == expected
    assert len(driver.take_complaints()) == len(captures) == 1
    assert ask(model, QUESTION) == expected
    assert driver.done("captures") == before + 1
    assert driver.done("launches") == launches


@pytest.mark.parametrize("name", ["cuStreamBeginCapture", "cuGraphInstantiateWithFlags"])
def test_a_graph_that_the_driver_refuses_is_done_without(
    open_model: Any, tiny_v1_bundle: Path, driver: Driver, name: str
) -> None:
    model = open_model(tiny_v1_bundle)
    expected = ask(open_model(tiny_v1_bundle), QUESTION)
    driver.fail(name, ILLEGAL_ADDRESS)
    with pytest.warns(UserWarning, match=r"without a CUDA graph, which is slower: CUDA graph: CUDA_ERROR_ILLEGAL"):
        assert ask(model, QUESTION) == expected


def test_too_little_memory_says_what_would_help(open_model: Any, tiny_v1_bundle: Path, driver: Driver) -> None:
    driver.set_memory(5_000_000)
    model = open_model(tiny_v1_bundle)
    with pytest.raises(
        runtime.BackendError,
        match=r"^the caches for 4096 tokens do not fit: \d+\.\d MB of the GPU's memory are needed, "
        r"\d\.\d MB of 5\.0 MB are free on memory of the host; end other sessions, or build an engine for fewer tokens",
    ):
        ask(model, QUESTION)
    driver.set_memory()
    assert ask(model, QUESTION) == ask(open_model(tiny_v1_bundle), QUESTION)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("cuMemAlloc", call) for call in (1, 2, 3)),
        *((n, call) for n in ("cuMemHostAlloc", "cuEventCreate") for call in (1, 2)),
    ],
)
def test_whatever_cannot_be_made_for_a_session(
    open_model: Any, tiny_v1_portable_bundle: Path, driver: Driver, name: str, call: int
) -> None:
    """What was made before it is given back, in whatever thread, and the next session is as if nothing had been."""
    model = open_model(tiny_v1_portable_bundle)
    expected = ask(model, "Hello", picture=None)
    gc.collect()
    before = driver.alive()

    def refused() -> None:
        # Twice: PyCUDA collects what Python can spare, and asks again.
        driver.fail(name, OUT_OF_MEMORY, call, times=2)
        with pytest.raises(runtime.BackendError) as caught:
            ask(model, "Hello", picture=None)
        driver.fail(None)
        assert "\n" not in str(caught.value)

    in_threads(refused)
    gc.collect()
    assert driver.alive() == before
    assert ask(model, "Hello", picture=None) == expected


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventSynchronize"])
def test_work_that_fails_is_one_line_and_the_next_session_answers(
    open_model: Any, tiny_v1_bundle: Path, driver: Driver, name: str
) -> None:
    model = open_model(tiny_v1_bundle)
    expected = ask(model, QUESTION)
    driver.fail(name, ILLEGAL_ADDRESS)
    with pytest.raises(runtime.BackendError, match=r"failed: \w+ failed: an illegal memory access was encountered$"):
        ask(model, QUESTION)
    assert ask(model, QUESTION) == expected


@pytest.mark.parametrize("after", [0, 3], ids=["prompt", "token"])
def test_an_interrupted_session_is_given_back_after_its_work(
    open_model: Any, tiny_v1_bundle: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C comes while the GPU works; then memory must stay until that is done."""
    model = open_model(tiny_v1_bundle)
    expected = ask(model, QUESTION)
    session = model.session(PICTURE, QUESTION, max_tiles=1, max_new_tokens=8)
    pieces = iter(session)
    for _ in range(after):
        next(pieces)
    from runtime.backends.cuda.pycuda import _Event

    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Event, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    del session, pieces
    gc.collect()
    assert ask(model, QUESTION) == expected


def test_a_session_that_never_asks_is_given_back(open_model: Any, tiny_v1_bundle: Path) -> None:
    """Its caches are being filled with zeros when it goes."""
    context = open_model(tiny_v1_bundle).backend.new_context()
    context.reserve(10)
    del context
