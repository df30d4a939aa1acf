"""The backend ``tensorrt`` as an app loads it, from a bundle to its answers, and what is said where it fails.

Real: pycuda, cuda-bindings, NVIDIA's Python module of TensorRT and all of our code. Not real: the driver and libnvinfer
below them, which keep everything in host memory; a plan is text, ONNX Runtime computes what is enqueued, and the plugin
library has a plugin that only can be found.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.backends.plugin_library import VARIABLE
from runtime.backends.tensorrt.engine import TensorRTRuntime
from runtime.backends.tensorrt.library import TensorRT
from runtime.bundle.manifest import VISION_GRAPH
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS

from ...runtime.test_golden import GOLDEN
from ..conftest import REPORTS
from . import building
from .conftest import VERSION, Make, Nvinfer, refusal

PICTURE = GOLDEN / "images/portrait.png"
QUESTION = "What is written here?"
TOLERANCE = 1e-4
"""Of float32 logits, which ONNX Runtime computes for both backends, in other pieces; 1.0e-5 was seen."""

TARGET = TARGETS["trt10.3"]


def ask(model: runtime.Model, picture: Path | None, tokens: int = 12) -> runtime.Session:
    return model.session(picture, QUESTION, max_tiles=1, max_new_tokens=tokens, return_logits=True)


@pytest.mark.parametrize("picture", [PICTURE, None], ids=["picture", "text"])
def test_answers_as_the_cpu_does(nvinfer: Nvinfer, make: Make, picture: Path | None) -> None:
    folder = make()
    model = runtime.load(folder, backend="tensorrt")
    assert model.backend.description.startswith("TensorRT 10.")
    expected, got = ask(runtime.load(folder), picture), ask(model, picture)
    assert got.text == expected.text
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=TOLERANCE)
    assert (str(folder / VISION_GRAPH) in nvinfer.ran) == (picture is not None)


def test_tokens_are_replayed(nvinfer: Nvinfer, make: Make) -> None:
    """The prompt, a token and the one that is recorded are enqueued; all others are in the recorded graph."""
    model = runtime.load(make(), backend="tensorrt")
    assert "CUDA graphs" in model.backend.description
    session = ask(model, None, tokens=20)
    assert session.text is not None
    assert len(nvinfer.enqueued) == 3
    assert len(nvinfer.ran) == len(session.generated_ids)


def test_an_engine_that_cannot_be_recorded(nvinfer: Nvinfer, make: Make) -> None:
    model = runtime.load(make(), backend="tensorrt")
    nvinfer.recordable = False
    session = ask(model, None)
    with pytest.warns(UserWarning, match=r"without a CUDA graph, which is slower: TensorRT .*: failed: IExecutionCont"):
        assert session.text is not None
    assert session.text == ask(model, None).text
    assert len(nvinfer.enqueued) == len(nvinfer.ran) == 2 * len(session.generated_ids)


def test_two_models(nvinfer: Nvinfer, make: Make) -> None:
    models = [runtime.load(make(name=name), backend="tensorrt") for name in ("a", "b")]
    answers = [[ask(model, picture).text for picture in (PICTURE, None)] for model in models]
    assert answers[0] == answers[1]
    sessions = [ask(model, PICTURE) for model in models]
    streams = [iter(session) for session in sessions]
    while [piece for stream in streams if (piece := next(stream, None)) is not None]:
        pass
    assert [session.text for session in sessions] == [answers[0][0]] * 2


def test_sessions_in_threads(nvinfer: Nvinfer, make: Make) -> None:
    model = runtime.load(make(), backend="tensorrt")
    alone = [ask(model, picture).text for picture in (PICTURE, None)]
    texts: dict[int, str] = {}

    def work(number: int) -> None:
        texts[number] = ask(model, (PICTURE, None)[number % 2]).text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[number] for number in range(4)] == 2 * alone


def test_errors_of_a_model_are_told_when_an_earlier_one_is_gone(nvinfer: Nvinfer, make: Make) -> None:
    """TensorRT keeps the first logger for what belongs to no engine, as plugins: it must outlive its model."""
    first, second = TensorRTRuntime(TARGET), TensorRTRuntime(TARGET)
    del first
    gc.collect()
    with second.listening():
        nvinfer.log("[monoedge] FusedMoE: cudaErrorInvalidValue")
        assert str(second.error("failed")).endswith(": failed: [monoedge] FusedMoE: cudaErrorInvalidValue")


def test_a_damaged_plan(nvinfer: Nvinfer, make: Make) -> None:
    folder = make(lambda text: "x" * len(text))
    plan = next(Bundle(folder).path(name) for name in Bundle(folder).manifest.engines if "decoder" in name)
    # The first error that TensorRT logs, not the last; and not that its registry had no plugin yet.
    reason = "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Version tag does not match.)"
    assert refusal(folder).endswith(f": cannot load {plan}: {reason}")


def test_a_plan_that_was_damaged(nvinfer: Nvinfer, make: Make) -> None:
    """A file of the same size: TensorRT says that it cannot be loaded, we say why, and what to do."""
    folder = make()
    name = next(name for name in Bundle(folder).manifest.engines if "decoder" in name)
    plan = Bundle(folder).path(name)
    plan.write_bytes(bytes(plan.stat().st_size))
    assert refusal(folder) == (
        f"{plan} was altered since it was built, its SHA-256 is not the recorded one: build it again with: "
        f"python -m export.engine --bundle {folder} --target trt10.3 --max-length 2048 --max-batch 1 --overwrite"
    )


def test_a_picture_s_plan_that_was_damaged(nvinfer: Nvinfer, make: Make) -> None:
    """It is loaded with the first picture; text is answered all the same."""
    folder = make()
    expected = ask(runtime.load(folder), None).text
    model = runtime.load(folder, backend="tensorrt")
    name = next(name for name in Bundle(folder).manifest.engines if "vision" in name)
    plan = Bundle(folder).path(name)
    plan.write_bytes(bytes(plan.stat().st_size))
    for _ in range(2):
        with pytest.raises(
            runtime.BackendError, match=r"vision\.plan was altered since it was built, .*: build it again"
        ):
            _ = ask(model, PICTURE).text
    assert ask(model, None).text == expected


def test_a_plan_that_cannot_be_read(nvinfer: Nvinfer, make: Make) -> None:
    folder = make(lambda text: "")
    assert "decoder.plan cannot be read: cannot mmap an empty file" in refusal(folder)


def test_a_plan_of_another_bundle(nvinfer: Nvinfer, make: Make) -> None:
    hidden = Bundle(make(name="other")).manifest.model.hidden_size
    folder = make(lambda text: re.sub(rf" {hidden}\b", f" {hidden + 8}", text))
    message = refusal(folder)
    assert "decoder.plan" in message
    assert "build it again with: python -m export.engine" in message


def test_an_engine_that_cannot_be_enqueued(nvinfer: Nvinfer, make: Make) -> None:
    model = runtime.load(make(lambda text: text.replace(" profiles", " fails enqueue profiles", 1)), backend="tensorrt")
    reason = r"^TensorRT 10\.\S+: failed: IExecutionContext::enqueueV3: .*this plan fails"
    for _ in range(2):
        with pytest.raises(runtime.BackendError, match=reason):
            _ = ask(model, None).text


def test_an_engine_that_has_no_room_to_run(nvinfer: Nvinfer, make: Make) -> None:
    folder = make(lambda text: text.replace(" profiles", " fails context profiles", 1))
    assert re.search(r"cannot make an execution context: .*OutOfMemory \(no memory for this plan\)$", refusal(folder))


def test_no_plugin_library(nvinfer: Nvinfer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    monkeypatch.setenv(VARIABLE, "nowhere.so")
    assert f"{VARIABLE} is nowhere.so, which is no file" in refusal(folder)


def test_a_plugin_library_that_cannot_be_loaded(
    nvinfer: Nvinfer, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libtext.so"
    library.write_text("text")
    monkeypatch.setenv(VARIABLE, str(library))
    assert f"cannot load the plugin library {library}: IPluginRegistry::loadLibrary: " in refusal(make(name="a"))
    monkeypatch.setenv(VARIABLE, str(nvinfer.folder / building.NO_PLUGIN))
    assert refusal(make(name="b")).endswith("libnone.so has no getCreators)")


def test_a_plugin_library_without_our_plugins(nvinfer: Nvinfer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(nvinfer.folder / building.OTHER_PLUGIN))
    folder = make()
    wanted = "has no plugin FusedMoE of version 1: build it again with: monoedge plugin"
    assert refusal(folder).endswith(f"libother.so {wanted}")
    assert refusal(folder).endswith(f": the plugin library of this process {wanted}; then start again")


def test_asking_for_plugins_is_no_error(nvinfer: Nvinfer) -> None:
    heard: list[str] = []
    tensorrt = TensorRT(TARGET, heard.append)
    runtime_ = TensorRTRuntime(TARGET)
    tensorrt.load_plugins(nvinfer.folder / building.PLUGIN, {"FusedMoE": 1})
    tensorrt.load_plugins(nvinfer.folder / building.PLUGIN, {"FusedMoE": 1})
    assert heard == []
    del runtime_


def test_models_that_are_loaded_at_once_register_plugins_once(nvinfer: Nvinfer) -> None:
    tensorrt, failed = TensorRTRuntime(TARGET), []
    before = sys.getswitchinterval()

    def load(start: threading.Barrier) -> None:
        start.wait()
        try:
            tensorrt.load_plugins(nvinfer.folder / building.PLUGIN, {"FusedMoE": 1})
        except runtime.BackendError as error:
            failed.append(error)

    sys.setswitchinterval(1e-7)
    try:
        for _ in range(20):
            nvinfer.forget_plugins()
            start = threading.Barrier(8)
            threads = [threading.Thread(target=load, args=(start,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failed == []


def test_the_reason_is_that_of_the_call(nvinfer: Nvinfer) -> None:
    """Not an error before it, nor one of another thread's call; but that of a thread of TensorRT's own."""
    tensorrt = TensorRTRuntime(TARGET)
    head = f"TensorRT {tensorrt.version}: failed"
    nvinfer.log("earlier")
    with tensorrt.listening():
        assert str(tensorrt.error("failed")) == head
        other = threading.Thread(target=_log_in_a_call, args=(tensorrt, nvinfer))
        other.start()
        other.join()
        assert str(tensorrt.error("failed")) == head
        nvinfer.log("from its own thread", thread=True)
        nvinfer.log("later")
        assert str(tensorrt.error("failed")) == f"{head}: from its own thread"
        assert str(tensorrt.error("failed", "known")) == f"{head}: known"
    with tensorrt.listening():
        assert str(tensorrt.error("failed")) == head


def _log_in_a_call(tensorrt: TensorRT, nvinfer: Nvinfer) -> None:
    with tensorrt.listening():
        nvinfer.log("of another call")


def test_a_tensorrt_that_does_not_start(nvinfer: Nvinfer, make: Make) -> None:
    """As where the driver is older than it wants."""
    nvinfer.start(False)
    assert refusal(make()).endswith(": cannot start: CUDA initialization failure with error: 35.")


@pytest.mark.parametrize("version", ["10.3", "10.13"])
def test_older_modules(tmp_path: Path, version: str) -> None:
    """The tests of this file with them: the newer libnvinfer has their calls in the same places."""
    building.bindings(version)
    options = ["-q", "-p", "no:cacheprovider", "-k", "not older and not two_models and not threads"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env={**os.environ, VERSION: version, REPORTS: str(tmp_path / "reports")},
        capture_output=True,
        text=True,
        check=False,
        cwd=building.ROOT,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
