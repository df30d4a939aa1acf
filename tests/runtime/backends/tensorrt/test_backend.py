"""The TensorRT backend but for TensorRT and the GPU: the official answers through it, on engines in host memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.bundle.manifest import to_format

from ...test_golden import CASES, GOLDEN
from .host_device import POISON, HostDevice
from .host_model import no_frames, open_on_engines, require_official_answer

PICTURE = GOLDEN / "images/portrait.png"
QUESTION = "What is written here?"


def open_on_host(
    bundle: Path,
    max_length: int = 4096,
    device: HostDevice | None = None,
    open_resize: Callable[[], Any] = no_frames,
) -> runtime.Model:
    """A bundle on engines of the plans that ``export.engine`` would build."""
    device = device or HostDevice()
    return open_on_engines(bundle, device, device, max_length, open_resize)


@pytest.fixture(scope="module")
def model(one_decoder_bundle: Path) -> runtime.Model:
    return open_on_host(one_decoder_bundle)


@pytest.fixture
def fresh(tiny_v1_bundle: Path) -> runtime.Model:
    return open_on_host(tiny_v1_bundle)


def device_of(model: runtime.Model) -> HostDevice:
    return model.backend.device


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_official_code(model: runtime.Model, name: str) -> None:
    require_official_answer(model, name)


def test_chunks_and_profiles(fresh: runtime.Model) -> None:
    """Prompts by the prefill profile, as many tokens as it takes at once; tokens by the other, in a graph."""
    session = fresh.session(PICTURE, QUESTION, max_tiles=12, max_new_tokens=6)
    assert session.text is not None
    prompt = session.stats.prompt_tokens
    assert prompt > 3 * 1024
    prefill, decode = fresh.backend.engine.executions
    assert prefill.tokens == [1024, 1024, 1024, prompt - 3 * 1024]
    assert not prefill.static
    # The first runs and the second is recorded; five tokens follow that of the prompt.
    assert decode.tokens == [1, 1]
    assert decode.static
    assert (device_of(fresh).captures, device_of(fresh).replays) == (1, 4)


def test_one_wait_a_token(fresh: runtime.Model) -> None:
    session = fresh.session(prompt=QUESTION, max_new_tokens=20)
    pieces = iter(session)
    next(pieces)
    before, tokens = device_of(fresh).waits, len(session.generated_ids)
    assert session.text
    assert device_of(fresh).waits - before == len(session.generated_ids) - tokens


def test_without_graphs(tiny_v1_bundle: Path, fresh: runtime.Model) -> None:
    plain = open_on_host(tiny_v1_bundle, device=HostDevice(has_graphs=False))
    sessions = [model.session(prompt=QUESTION, max_new_tokens=12) for model in (plain, fresh)]
    assert sessions[0].text == sessions[1].text
    assert device_of(plain).captures == device_of(plain).replays == 0
    assert device_of(fresh).replays == 10


def test_a_graph_that_cannot_be_recorded_is_told_and_done_without(fresh: runtime.Model, tiny_v1_bundle: Path) -> None:
    device_of(fresh).capture_fails = True
    with pytest.warns(UserWarning, match=r"without a CUDA graph, which is slower: .*UNSUPPORTED"):
        text = fresh.session(prompt=QUESTION, max_new_tokens=12).text
    # Once, and not tried again.
    assert fresh.session(prompt=QUESTION, max_new_tokens=12).text == text
    assert device_of(fresh).captures == 1
    assert text == open_on_host(tiny_v1_bundle).session(prompt=QUESTION, max_new_tokens=12).text


def test_not_recorded_before_tensorrt_allows(fresh: runtime.Model) -> None:
    session = fresh.session(prompt=QUESTION, max_new_tokens=8)
    next(iter(session))
    execution = fresh.backend.engine.executions[-1]
    execution.capturable = False
    ran = execution.enqueued
    assert session.text
    assert device_of(fresh).captures == 0 or execution.enqueued == ran


def test_interleaved_sessions_keep_apart(fresh: runtime.Model) -> None:
    questions = [QUESTION, "Hello", "Where is it? " * 30]
    alone = [fresh.session(PICTURE, question, max_tiles=1, max_new_tokens=16).text for question in questions]
    sessions = [fresh.session(PICTURE, question, max_tiles=1, max_new_tokens=16) for question in questions]
    streams = [iter(session) for session in sessions]
    while [piece for stream in streams if (piece := next(stream, None)) is not None]:
        pass
    assert [session.text for session in sessions] == alone


def test_sessions_in_threads(fresh: runtime.Model) -> None:
    questions = [f"{QUESTION} {number}" for number in range(6)]
    alone = [fresh.session(PICTURE, question, max_tiles=1, max_new_tokens=8).text for question in questions]
    answers: dict[str, str] = {}

    def work(question: str) -> None:
        answers[question] = fresh.session(PICTURE, question, max_tiles=1, max_new_tokens=8).text

    threads = [threading.Thread(target=work, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[question] for question in questions] == alone


def test_a_prompt_is_not_written_over_before_it_is_read(fresh: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all sessions go through the same host memory, and another thread may come while one still waits."""
    backend, mask = fresh.backend, np.zeros(40, np.bool_)
    prompts = [fresh.embed(np.arange(first, first + 40)) for first in (5, 100)]
    contexts = [backend.new_context() for _ in range(3)]
    for context in contexts:
        context.reserve(40)
    expected = contexts[2].forward(prompts[0], mask, 0)
    with monkeypatch.context() as patch:
        patch.setattr(contexts[0]._memory.done, "wait", lambda: None)
        contexts[0].forward(prompts[0], mask, 0)
    assert device_of(fresh).queue
    other = contexts[1].forward(prompts[1], mask, 0)
    np.testing.assert_array_equal(contexts[0]._memory.logits, expected)
    assert not np.array_equal(other, expected)


def test_caches_of_an_ended_session_are_the_next_ones(fresh: runtime.Model) -> None:
    """With their execution and its recorded graph, which take long to make; and what they held is not seen."""
    device = device_of(fresh)
    before = set(device.live)
    session = fresh.session(prompt=QUESTION, max_new_tokens=4)
    assert session.text is not None
    first = device.live - before
    facts = fresh.bundle.manifest.model
    caches = 2 * facts.num_hidden_layers * facts.num_key_value_heads * 4096 * facts.head_dim * 4
    assert caches <= sum(block.size for block in first) < 1.2 * caches
    alone = open_on_host(fresh.bundle.folder).session(prompt="Hello", max_new_tokens=8).text
    for block in first:
        if block.size >= caches:
            block.array[: caches // 2] = POISON
    del session
    gc.collect()
    executions = len(fresh.backend.engine.executions)
    for _ in range(3):
        assert fresh.session(prompt="Hello", max_new_tokens=8).text == alone
        gc.collect()
    assert device.live - before == first
    assert len(fresh.backend.engine.executions) == executions
    assert device.captures == 1
    # Two at once need two.
    sessions = [fresh.session(prompt="Hello", max_new_tokens=8) for _ in range(2)]
    assert [session.text for session in sessions] == [alone, alone]
    assert len(fresh.backend.engine.executions) == executions + 1


TILE = np.zeros((1, 3, 448, 448), np.float32)


def test_caches_that_wait_make_room(tiny_v1_bundle: Path) -> None:
    """They are freed where something else needs their memory."""
    device = HostDevice()
    before = device.free_bytes
    model = open_on_host(tiny_v1_bundle, device=device)
    opened = before - device.free_bytes
    model.backend.encode_image(TILE)
    seeing = before - device.free_bytes - opened

    model, device = None, HostDevice(memory=opened + seeing + 1_000)
    model = open_on_host(tiny_v1_bundle, device=device)
    assert model.session(prompt=QUESTION, max_new_tokens=4).text is not None
    gc.collect()
    assert device.free_bytes < seeing
    model.backend.encode_image(TILE)
    assert device.free_bytes == 1_000


def test_what_failed_in_part_holds_no_memory(tiny_v1_bundle: Path) -> None:
    device = HostDevice()
    model = open_on_host(tiny_v1_bundle, device=device)
    before = set(device.live)
    for room in (10_000, 40_000_000, 63_000_000):
        device.free_bytes = room
        with pytest.raises(runtime.BackendError, match="bytes are needed"):
            model.backend.encode_image(TILE)
        assert (device.live, device.free_bytes) == (before, room)
    device.free_bytes = 1_000
    with pytest.raises(runtime.BackendError, match="the caches for 4096 tokens do not fit"):
        model.backend.new_context().reserve(1)
    assert device.live == before


def test_caches_of_a_call_that_failed_are_not_used_again(fresh: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device, mask = device_of(fresh), np.zeros(1, np.bool_)
    before = set(device.live)

    def fail() -> None:
        raise runtime.BackendError("the GPU failed")

    context = fresh.backend.new_context()
    context.reserve(1)
    monkeypatch.setattr(context._memory.done, "record", fail)
    with pytest.raises(runtime.BackendError, match="the GPU failed"):
        context.forward(fresh.embed(np.arange(5, 6)), mask, 0)
    del context
    gc.collect()
    assert device.live == before


def test_too_little_memory_says_what_would_help(tiny_v1_bundle: Path) -> None:
    model = open_on_host(tiny_v1_bundle, device=HostDevice(memory=5_000_000))
    with pytest.raises(runtime.BackendError, match=r"the caches for 4096 tokens do not fit: \d+ bytes are needed"):
        _ = model.session(prompt=QUESTION, max_new_tokens=4).text
    assert model.backend.layout.capacity == 4096


def test_the_engine_sets_the_length(tiny_v1_bundle: Path) -> None:
    model = open_on_host(tiny_v1_bundle, max_length=64)
    assert (model.max_length, model.backend.chunk) == (64, 64)
    with pytest.raises(
        runtime.PromptError, match=r"together 7\d, but the engine was built for 64 \(more take …\): use"
    ):
        model.session(prompt=QUESTION, max_new_tokens=40)
    # Without a number, the answer gets what room there is.
    session = model.session(prompt=QUESTION)
    assert session.text is not None
    assert session.stats.prompt_tokens + session.stats.generated_tokens == 64
    with pytest.raises(runtime.BackendError, match="65 tokens were asked for, but the engine was built for 64"):
        model.backend.new_context().reserve(65)


def test_memory_is_given_back_with_the_model(tiny_v1_bundle: Path) -> None:
    device = HostDevice()
    model = open_on_host(tiny_v1_bundle, device=device)
    assert model.session(PICTURE, QUESTION, max_tiles=1, max_new_tokens=4).text is not None
    assert device.live
    del model
    gc.collect()
    assert device.live == set()


@pytest.mark.parametrize("tiles", [1, 5, 13, 14, 30])
def test_any_number_of_tiles(fresh: runtime.Model, tiles: int) -> None:
    rng = np.random.default_rng(tiles)
    pixels = rng.standard_normal((tiles, 3, 448, 448), np.float32)
    visual = runtime.load(fresh.bundle.folder).backend.encode_image(pixels)
    np.testing.assert_allclose(fresh.backend.encode_image(pixels), visual, rtol=0, atol=1e-5)
    # More scratch than the decoder's: it got its own.
    assert {e.scratch.size for e in fresh.backend._vision._executions.values()} == {5000}


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # two ties
    target = np.empty(values.shape, np.uint16)
    to_format(values, target)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(target, expected)
