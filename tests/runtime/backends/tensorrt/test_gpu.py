"""TensorRT on a GPU: plans built here, and the official answers out of them.

They run where a device, PyCUDA, a TensorRT and the plugin library are; elsewhere each is skipped with what is missing.
"""

from __future__ import annotations

import importlib.util
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import runtime
from export.engine import main as build_engine
from runtime.backends.cuda.driver import find_device
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS

from ...test_golden import GOLDEN, load_case

DEVICE = find_device()
INSTALLED = [target for target in TARGETS.values() if target.installed]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE is None, reason="there is no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("pycuda") is None, reason="pycuda is not installed"),
    pytest.mark.skipif(not INSTALLED, reason="no TensorRT is installed"),
]

LOGITS_DISTANCE = 0.06
"""Greatest distance of bf16 logits from the official ones in float32, in lengths of these. The official code in bf16 is
0.019 (version 1.0) and 0.030 (1.5) away from them."""


@pytest.fixture(scope="module")
def built(bf16_bundle: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the engines that a user would build."""
    folder = tmp_path_factory.mktemp("gpu") / bf16_bundle.name.removesuffix("-bf16")
    shutil.copytree(bf16_bundle, folder)
    target = INSTALLED[0].name
    build_engine(["--bundle", str(folder), "--target", target, "--max-length", "4096", "--plugin", str(library)])
    return folder


@pytest.fixture(scope="module")
def model(built: Path, library: Path) -> runtime.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
        return runtime.load(built, backend="tensorrt")


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ["one_tile", "text_only", "two_images", "wide_tiles12", "two_turn"])
def test_logits_as_the_official_code(model: runtime.Model, name: str) -> None:
    """The first token's, of every turn; bf16 may choose other tokens later."""
    case, tensors = load_case(model.bundle.folder.name, name)
    images = [GOLDEN / "images" / file for file, _ in case["images"]]
    max_tiles = case["images"][0][1] if images else None
    session = model.session(images, case["questions"][0], max_tiles=max_tiles, max_new_tokens=8, return_logits=True)
    assert session.text is not None
    expected = tensors["turn0.step_logits" if len(case["turns"]) > 1 else "step_logits"]
    assert relative(session.logits[0], expected[0]) < LOGITS_DISTANCE


def test_graphs_change_nothing(model: runtime.Model) -> None:
    def answer() -> np.ndarray:
        session = model.session(prompt="Describe the image.", max_new_tokens=24, return_logits=True)
        assert session.text is not None
        return session.logits

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_graphs = answer()
    model.backend.device.has_graphs, before = False, model.backend.device.has_graphs
    try:
        np.testing.assert_array_equal(with_graphs, answer())
    finally:
        model.backend.device.has_graphs = before


def test_prefill_and_decode_agree(model: runtime.Model) -> None:
    """Tokens computed one by one, through the other profile, give the logits of the prompt computed at once."""
    ids = np.arange(5, 45)
    embeds, mask = model.embed(ids), np.zeros(len(ids), np.bool_)
    at_once, one_by_one = model.backend.new_context(), model.backend.new_context()
    for context in (at_once, one_by_one):
        context.reserve(len(ids))
    whole = at_once.forward(embeds, mask, 0)
    for index in range(len(ids)):
        last = one_by_one.forward(embeds[index : index + 1], mask[:1], index)
    assert relative(last, whole) < LOGITS_DISTANCE


def test_sessions_in_threads(model: runtime.Model) -> None:
    questions = [f"What is written here? {number}" for number in range(4)]
    picture = GOLDEN / "images/portrait.png"

    def ask(question: str) -> str:
        return model.session(picture, question, max_tiles=1, max_new_tokens=24).text

    alone = [ask(question) for question in questions]
    answers: dict[str, str] = {}
    threads = [threading.Thread(target=lambda q=question: answers.update({q: ask(q)})) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[question] for question in questions] == alone


def test_memory_is_given_back(model: runtime.Model) -> None:
    def used() -> int:
        found = find_device()
        assert found is not None
        return found.total_memory - found.free_memory

    def ask() -> None:
        assert model.session(prompt="Hello", max_new_tokens=8).text is not None

    ask()
    before = used()
    for _ in range(20):
        ask()
    assert used() <= before + (1 << 20)


def test_kernels_are_compiled_once(built: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX keeps what it compiled, and takes it again at the next start."""
    if INSTALLED[0].name != "trt-rtx":
        pytest.skip(f"{INSTALLED[0].title} compiles when a plan is built")
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
    texts, written = [], []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = runtime.load(built, backend="tensorrt")
            session = model.session(GOLDEN / "images/portrait.png", "Hello", max_tiles=1, max_new_tokens=8)
            texts.append(session.text)
        files = (built / "engines").glob("*.runtime_cache")
        written.append({file.name: file.stat().st_mtime_ns for file in files})
    assert texts[0] == texts[1]
    assert len(written[0]) == 2
    assert written[0] == written[1]


def test_another_plugin_library_is_refused(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.so").write_bytes(b"other")
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(tmp_path / "other.so"))
    with pytest.raises(runtime.BackendError, match="was built with another plugin"):
        runtime.load(built, backend="tensorrt")


def test_a_damaged_plan_is_one_line(
    built: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(built, folder)
    for name in Bundle(folder).manifest.engines:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        (folder / name).write_bytes(data)
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
    with pytest.raises(runtime.BackendError) as caught:
        runtime.load(folder, backend="tensorrt")
    assert "\n" not in str(caught.value)
