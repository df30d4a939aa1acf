"""What tests of several folders share: bundles, exported once a run by the command that users run, and the plugin."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from export.onnx import main
from export.quantized.bundle import write_quantized
from export.quantized.quantizable import choose_matrices, find_matrices
from export.quantized.weights import DecoderWeights
from runtime.backends.plugin_library import LIBRARY
from runtime.bundle.reader import Bundle

from .plans import absmax_plan

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/test-plugin"
ARCHITECTURE = "80-virtual"
"""PTX, which any later GPU compiles for itself: one is enough where no kernel runs, whatever GPU engines are for."""

SLOW = (
    *("test_docs.py", "benchmarks", "examples", "plugins_trt/test_build.py", "plugins_trt/test_kernels.py"),
    *("plugins_trt/test_kernels_build.py", "plugins_trt/plugin"),
    *("calibration/test_calibration_command.py", "export/engines", "export/recorded", "export/test_cpu_target.py"),
    *("export/test_onnx_command.py", "export/passes", "export/quantized/test_rewrite.py"),
    *("runtime/bench", "runtime/chat", "runtime/doctor", "runtime/images/test_frames.py"),
    *("runtime/test_shared_session.py", "cuda_driver/nvinfer", "cuda_driver/test_answers"),
)
"""Where tests are marked slow as a whole: they run commands, compilers and TensorRT. ``make test-quick`` skips them."""

# A shell's background jobs ignore interrupts, those of nohup hangups, and so would the processes that tests interrupt:
# they inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what ``SLOW`` lists."""
    for item in items:
        if item.path.is_relative_to(ROOT) and item.path.relative_to(ROOT / "tests").as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Lets one of the processes that run tests make something, while the others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _export(checkpoint: Path, target: Path, dtype: str = "fp32", *options: str) -> Path:
    with alone(target):
        if not target.exists():
            main(["--ckpt", str(checkpoint), "-o", str(target), "--dtype", dtype, *options])
    return target


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let tests mount a small disk, which needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the bundles of this run stand in, whichever process makes and uses them."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "bundles"


@pytest.fixture(scope="session")
def tiny_v1_bundle(bundles: Path) -> Path:
    """Random weights, version 1.0."""
    return _export(ROOT / "tests/data/golden/tiny-v1/checkpoint", bundles / "tiny-v1")


@pytest.fixture(scope="session")
def tiny_v15_bundle(bundles: Path) -> Path:
    """Random weights, version 1.5."""
    return _export(ROOT / "tests/data/golden/tiny-v15/checkpoint", bundles / "tiny-v15")


@pytest.fixture(scope="session")
def tiny_v1_portable_bundle(bundles: Path) -> Path:
    """Random weights, version 1.0, graphs of older operators."""
    checkpoint = ROOT / "tests/data/golden/tiny-v1/checkpoint"
    return _export(checkpoint, bundles / "portable/tiny-v1", "fp32", "--target", "trt10.3")


@pytest.fixture(scope="session")
def tiny_v15_portable_bundle(bundles: Path) -> Path:
    """Random weights, version 1.5, graphs of older operators."""
    checkpoint = ROOT / "tests/data/golden/tiny-v15/checkpoint"
    return _export(checkpoint, bundles / "portable/tiny-v15", "fp32", "--target", "trt10.3")


@pytest.fixture(scope="session")
def tiny_v1_cpu_bundle(bundles: Path) -> Path:
    """Random weights, version 1.0, a decoder for each kind of tokens."""
    return _export(ROOT / "tests/data/golden/tiny-v1/checkpoint", bundles / "cpu/tiny-v1", "fp32", "--target", "cpu")


@pytest.fixture(scope="session")
def tiny_v15_cpu_bundle(bundles: Path) -> Path:
    """Random weights, version 1.5, a decoder for each kind of tokens."""
    return _export(ROOT / "tests/data/golden/tiny-v15/checkpoint", bundles / "cpu/tiny-v15", "fp32", "--target", "cpu")


@pytest.fixture(
    scope="session",
    params=[f"tiny_{version}{form}_bundle" for form in ("", "_portable", "_cpu") for version in ("v1", "v15")],
    ids=[f"tiny-{version}{form}" for form in ("", "-portable", "-cpu") for version in ("v1", "v15")],
)
def golden_bundle(request: pytest.FixtureRequest) -> Path:
    """What has to answer as the official code does, in a folder of the checkpoint's name."""
    bundle: Path = request.getfixturevalue(request.param)
    return bundle


@pytest.fixture(
    scope="session",
    params=[f"tiny_{version}{form}_bundle" for form in ("", "_portable") for version in ("v1", "v15")],
    ids=[f"tiny-{version}{form}" for form in ("", "-portable") for version in ("v1", "v15")],
)
def one_decoder_bundle(request: pytest.FixtureRequest) -> Path:
    """The same of those with one decoder for both kinds of tokens, as engines and recordings want it."""
    bundle: Path = request.getfixturevalue(request.param)
    return bundle


@pytest.fixture(scope="session")
def shapes_bundle(bundles: Path) -> Path:
    """The trained example."""
    return _export(ROOT / "examples/shapes/checkpoint", bundles / "shapes")


@pytest.fixture(scope="session", params=["tiny-v1", "tiny-v15"])
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """Both versions in turn."""
    bundle: Path = request.getfixturevalue(f"{request.param.replace('-', '_')}_bundle")
    return bundle


@pytest.fixture(scope="session")
def tiny_v1_bf16_bundle(bundles: Path) -> Path:
    """As GPUs want it."""
    return _export(ROOT / "tests/data/golden/tiny-v1/checkpoint", bundles / "tiny-v1-bf16", "bf16")


@pytest.fixture(scope="session")
def tiny_v15_bf16_bundle(bundles: Path) -> Path:
    """As GPUs want it."""
    return _export(ROOT / "tests/data/golden/tiny-v15/checkpoint", bundles / "tiny-v15-bf16", "bf16")


@pytest.fixture(scope="session")
def shapes_bf16_bundle(bundles: Path) -> Path:
    """The trained example, as GPUs want it."""
    return _export(ROOT / "examples/shapes/checkpoint", bundles / "shapes-bf16", "bf16")


@pytest.fixture(scope="session", params=["tiny-v1", "tiny-v15"])
def bf16_bundle(request: pytest.FixtureRequest) -> Path:
    """Both versions in turn, as GPUs want them."""
    bundle: Path = request.getfixturevalue(f"{request.param.replace('-', '_')}_bf16_bundle")
    return bundle


# Data of calibrations -----------------------------------------------------------------------------------------------

QUESTIONS = ("How many shapes are there?", "What color is the circle?", "Describe the image.")
COLORS = ("red", "green", "blue", "orange", "black")


def draw_picture(file: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    picture = Image.new("RGB", (448, 448), "white")
    pen = ImageDraw.Draw(picture)
    for _ in range(1 + seed % 3):
        x, y = (int(place) for place in generator.integers(20, 330, 2))
        color = COLORS[int(generator.integers(len(COLORS)))]
        (pen.ellipse if generator.random() < 0.5 else pen.rectangle)([x, y, x + 90, y + 90], fill=color)
    picture.save(file)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file: 20 questions about pictures, 4 about none; some have answers."""
    folder = tmp_path_factory.mktemp("pairs")
    entries = []
    for number in range(20):
        draw_picture(folder / f"{number}.png", number)
        entry = {"image": f"{number}.png", "prompt": QUESTIONS[number % len(QUESTIONS)]}
        entries.append(entry | ({"answer": "There are two shapes."} if number % 4 == 0 else {}))
    entries += [{"image": None, "prompt": f"{color} circle. {QUESTIONS[1]}"} for color in COLORS[:4]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "pairs.jsonl"


Quantize = Callable[..., Path]


@pytest.fixture(scope="session")
def quantize(bundles: Path) -> Quantize:
    """Makes a quantized bundle of one that is not, once a run. Weights have scales of their own; those of activations,
    which data would give, are all the same and wide enough for the tiny models."""

    def make(bundle: Path, mode: str = "w8a16", form: str = "qdq", everything: bool = False) -> Path:
        target = bundles / f"{bundle.name}-{mode}-{form}{'-everything' * everything}"
        with alone(target):
            if not target.exists():
                write(bundle, target, mode, form, everything)
        return target

    def write(bundle: Path, target: Path, mode: str, form: str, everything: bool) -> None:
        source = Bundle(bundle)
        weights = DecoderWeights(source)
        matrices = find_matrices(weights.model)
        if not everything:
            matrices = choose_matrices(matrices)
        plan = absmax_plan(weights, [matrix.name for matrix in matrices])
        if mode == "w8a8":
            matrices = tuple(replace(matrix, input_scale=0.04) for matrix in plan.matrices)
            plan = replace(plan, mode=mode, matrices=matrices)
        write_quantized(source, target, plan, form=form)

    return make


@pytest.fixture(scope="session")
def plugin_build() -> Path:
    """The build folder of the library and its host, for one architecture and kept for next time."""
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, which builds the plugin library")
    with alone(BUILD):
        configure = ["cmake", "-B", BUILD, "-S", ROOT, f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}"]
        configure += ["-DMONOEDGE_WERROR=ON"]
        result = subprocess.run(configure, capture_output=True, text=True, check=False)
        if "NvInferRuntime.h" in result.stderr:
            pytest.skip("TensorRT's headers are not here; this fetches them: make build/tensorrt_headers")
        assert result.returncode == 0, result.stderr
        result = subprocess.run(
            ["cmake", "--build", BUILD, "--target", "plugin_host"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return BUILD


@pytest.fixture(scope="session")
def library(plugin_build: Path) -> Path:
    return plugin_build / LIBRARY
