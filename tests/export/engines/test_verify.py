"""New engines are tried before they are registered. ONNX Runtime stands in for the GPU, in fp16, which it computes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from export.engine import main
from export.engines import verify as engine_verify
from export.onnx import main as export
from export.recorded.format import MADE_OF, why_missing
from runtime.backends.cuda.driver import Device
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.console.console import SILENT, Console
from runtime.errors import BackendError, BundleError

from ..recorded.test_recording import without_recording
from .test_trtexec import HEAD

ROOT = Path(__file__).resolve().parents[3]
DEVICE = Device("a GPU", 87, 1 << 33, 1 << 33)


@pytest.fixture(scope="module")
def fp16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "tiny-v1"
    export(["--ckpt", str(ROOT / "tests/data/golden/tiny-v1/checkpoint"), "-o", str(folder), "--dtype", "fp16"])
    return folder


@pytest.fixture
def bundle(fp16_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp16_bundle, tmp_path / "bundle"))


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    """The same with one matrix upside down: what an engine of it would answer."""
    folder = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    model = onnx.load(folder / DECODER_GRAPH, load_external_data=False)
    (item,) = [item for item in model.graph.initializer if item.name == "layers.1.feed_forward.visual_down"]
    place = {entry.key: entry.value for entry in item.external_data}
    matrix = np.memmap(folder / place["location"], np.float16, "r+", int(place["offset"]), tuple(item.dims))
    matrix[:] = matrix[::-1].copy()
    matrix.flush()
    return folder


Plans = Mapping[str, tuple[Path, EngineRecord]]
Tried = list[Plans]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Tried]:
    """A GPU whose engines answer as a bundle does; gives the plans that were tried."""

    def make(answers: Path) -> Tried:
        tried: Tried = []

        def backend(bundle: Bundle, plans: Plans) -> Any:
            assert all(path.read_bytes().startswith(HEAD) for path, _ in plans.values())
            tried.append(plans)
            return OnnxRuntimeBackend(Bundle(answers))

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert command == [sys.executable, "-m", "export.engines.verify"]
            answer = engine_verify._try(json.loads(options["input"]))
            return subprocess.CompletedProcess(command, 0, json.dumps(answer) + "\n", "")

        monkeypatch.setattr("runtime.backends.cuda.driver.find_device", lambda: DEVICE)
        monkeypatch.setitem(sys.modules, "runtime.backends.tensorrt.backend", SimpleNamespace(TensorRTBackend=backend))
        monkeypatch.setattr(engine_verify.subprocess, "run", run)
        return tried

    return make


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Something like plans, and a plugin."""
    made = {name: tmp_path / f"made.{name}" for name in ("decoder.plan", "vision.plan", "so")}
    for file in made.values():
        file.write_bytes(HEAD + file.name.encode())
    return made


def register(bundle: Path, files: dict[str, Path], *names: str) -> None:
    plans = [str(files[name]) for name in names]
    main(
        ["--bundle", str(bundle), "--target", "trt", "--register", *plans, "--plugin", str(files["so"]), "--overwrite"]
    )


def test_what_agrees_is_registered(
    bundle: Path, files: dict[str, Path], device: Callable[[Path], Tried], capsys: pytest.CaptureFixture[str]
) -> None:
    (tried := device(bundle)).clear()
    register(bundle, files, "decoder.plan", "vision.plan")
    assert set(tried[0]) == {DECODER_GRAPH, VISION_GRAPH}
    assert len(Bundle(bundle).manifest.engines) == 2
    assert "checked: answers as ONNX Runtime does (decoder.onnx " in capsys.readouterr().err
    # One graph alone is tried with the decoder that is there.
    register(bundle, files, "vision.plan")
    assert tried[1][DECODER_GRAPH][0].parent == bundle / "engines"
    assert "checked: answers as ONNX Runtime does (vision.onnx " in capsys.readouterr().err
    main(["--bundle", str(bundle), "--check", "--plugin", str(files["so"])])
    assert set(tried[2]) == {DECODER_GRAPH, VISION_GRAPH}
    assert "checked: answers as ONNX Runtime does (" in capsys.readouterr().err


def test_what_disagrees_is_not(
    bundle: Path, damaged: Path, files: dict[str, Path], device: Callable[[Path], Tried]
) -> None:
    device(damaged)
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(BackendError) as caught:
        register(bundle, files, "decoder.plan", "vision.plan")
    assert str(caught.value).startswith("decoder.onnx disagrees with what ONNX Runtime answered: after the prompt of ")
    assert str(caught.value).endswith("; nothing was registered")
    assert (bundle / "manifest.json").read_bytes() == before
    assert not (bundle / "engines").exists()


def test_check_tells_a_registered_engine_that_disagrees(
    bundle: Path, damaged: Path, files: dict[str, Path], device: Callable[[Path], Tried]
) -> None:
    device(bundle)
    register(bundle, files, "decoder.plan", "vision.plan")
    device(damaged)
    with pytest.raises(BackendError, match=r"^decoder\.onnx disagrees"):
        main(["--bundle", str(bundle), "--check", "--plugin", str(files["so"])])


def test_a_bundle_without_recording_is_recorded_first(
    bundle: Path, files: dict[str, Path], device: Callable[[Path], Tried], capsys: pytest.CaptureFixture[str]
) -> None:
    device(bundle)
    without_recording(bundle)
    register(bundle, files, "decoder.plan", "vision.plan")
    assert why_missing(Bundle(bundle, verify=True)) is None
    said = capsys.readouterr().err
    assert "recording what ONNX Runtime answers, since the bundle has no recorded set" in said
    assert "checked: answers as ONNX Runtime does" in said


def test_not_checked(
    bundle: Path,
    files: dict[str, Path],
    device: Callable[[Path], Tried],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be tried is registered, and the reason is told."""
    tried = device(bundle)
    register(bundle, files, "vision.plan")
    assert "not checked: what the engine answers, since there is no decoder" in capsys.readouterr().err
    plans = ["--register", str(files["decoder.plan"]), "--plugin", str(files["so"]), "--overwrite"]
    for options, words in (
        (
            ["--sm", "89"],
            f"since it is for SM 89, this GPU is SM 87; on the device: python -m export.engine --bundle {bundle}",
        ),
        (["--max-length", "64"], "since it holds 64 tokens, what was recorded takes "),
        (["--max-batch", "2"], "since it takes 2 conversations at once"),
    ):
        main(["--bundle", str(bundle), "--target", "trt", *options, *plans])
        assert words in capsys.readouterr().err
    (bundle / MADE_OF).write_text("{}" + " " * ((bundle / MADE_OF).stat().st_size - 2))
    with pytest.raises(BundleError, match="is damaged"):
        main(["--bundle", str(bundle), "--target", "trt", *plans])
    without_recording(bundle)
    find = importlib.util.find_spec
    monkeypatch.setattr(engine_verify, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    register(bundle, files, "decoder.plan")
    assert "since the bundle has no recorded set, and onnxruntime, which makes it, is not" in capsys.readouterr().err
    assert tried == []


def test_nothing_to_check(
    bundle: Path, files: dict[str, Path], device: Callable[[Path], Tried], monkeypatch: pytest.MonkeyPatch
) -> None:
    device(bundle)
    check = ["--bundle", str(bundle), "--check", "--plugin", str(files["so"])]
    with pytest.raises(BundleError, match="has no engines for SM 87, a GPU"):
        main(check)
    monkeypatch.setattr("runtime.backends.cuda.driver.find_device", lambda: None)
    with pytest.raises(BackendError, match="there is no GPU here"):
        main(check)


@pytest.fixture
def plans(bundle: Path, files: dict[str, Path]) -> dict[str, tuple[Path, EngineRecord]]:
    record = EngineRecord(1, "0" * 64, DECODER_GRAPH, "trt", "10.15.1.29", 87, "", "0", "0", 8192, 1)
    return {DECODER_GRAPH: (files["decoder.plan"], record)}


def test_the_other_process(
    bundle: Path, files: dict[str, Path], plans: Plans, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real one, which finds no GPU here."""
    if importlib.util.find_spec("pycuda") is not None:
        pytest.skip("pycuda is installed, so that an engine could be tried")
    engine_verify.verify(Bundle(bundle), plans, files["so"], DEVICE, Console())
    assert capsys.readouterr().err == (
        "not checked: what the engine answers, since pycuda is not installed; this adds it: pip install pycuda\n"
    )


@pytest.mark.parametrize(
    ("code", "told"), [("os.abort()", "SIGABRT: libnvinfer is unwell"), ("exit(3)", "exit code 3: lib")]
)
def test_a_process_that_dies(
    bundle: Path, files: dict[str, Path], plans: Plans, code: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run
    program = f"import os, sys; print('libnvinfer is unwell', file=sys.stderr, flush=True); {code}"
    monkeypatch.setattr(
        engine_verify.subprocess, "run", lambda command, **options: run([sys.executable, "-c", program], **options)
    )
    with pytest.raises(BackendError, match=f"^the process that tries the engine ended with {told}"):
        engine_verify.verify(Bundle(bundle), plans, files["so"], DEVICE, SILENT)
