"""The engine backend on the real PyCUDA and cuda-bindings, where the driver refuses, fails or is interrupted.

Real and not real is what ``test_answers`` says.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest

import runtime

from ..runtime.backends.tensorrt.host_device import HostExecution
from .driver_reports import Driver
from .models import PICTURE, QUESTION, ask
from .threads import in_threads

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700


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
    other = model.backend.new_context()
    other.reserve(1)  # with the caches of the session before, which the next would use
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


@pytest.mark.parametrize("name", ["cuMemAlloc", "cuMemHostAlloc", "cuEventCreate"])
@pytest.mark.parametrize("what", ["model", "first picture"])
def test_whatever_cannot_be_made_for_a_model(
    open_model: Any, tiny_v1_bundle: Path, driver: Driver, what: str, name: str
) -> None:
    """The last of each kind that is made, so that all before it have to be given back."""
    calls = {
        "model": {"cuMemAlloc": 2, "cuMemHostAlloc": 1, "cuEventCreate": 1},
        "first picture": {"cuMemAlloc": 3, "cuMemHostAlloc": 2, "cuEventCreate": 1},
    }
    model = open_model(tiny_v1_bundle) if what == "first picture" else None
    if model is not None:
        ask(model, "Hello", picture=None)  # its caches stay for the next session
        gc.collect()
    before = driver.alive()

    def refused() -> None:
        driver.fail(name, OUT_OF_MEMORY, calls[what][name], times=2)
        with pytest.raises(runtime.BackendError):
            ask(model, QUESTION) if model else open_model(tiny_v1_bundle)
        driver.fail(None)

    in_threads(refused)
    gc.collect()
    assert driver.alive() == before | {"retains": 1}
    assert ask(model or open_model(tiny_v1_bundle), QUESTION) == ask(open_model(tiny_v1_bundle), QUESTION)


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
