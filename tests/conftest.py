"""What tests of several folders share: bundles, exported once a run by the command that users run, and the plugin."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

from export.onnx import main
from plugins_trt.library import LIBRARY

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/test-plugin"
ARCHITECTURE = "89-real"
"""One is enough where no kernel runs."""


def _export(checkpoint: Path, target: Path, dtype: str = "fp32") -> Path:
    main(["--ckpt", str(checkpoint), "-o", str(target), "--dtype", dtype])
    return target


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the bundles of this run stand in."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def tiny_v1_bundle(bundles: Path) -> Path:
    """Random weights, version 1.0."""
    return _export(ROOT / "tests/data/golden/tiny-v1/checkpoint", bundles / "tiny-v1")


@pytest.fixture(scope="session")
def tiny_v15_bundle(bundles: Path) -> Path:
    """Random weights, version 1.5."""
    return _export(ROOT / "tests/data/golden/tiny-v15/checkpoint", bundles / "tiny-v15")


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


@pytest.fixture(scope="session", params=["tiny-v1", "tiny-v15"])
def bf16_bundle(request: pytest.FixtureRequest) -> Path:
    """Both versions in turn, as GPUs want them."""
    bundle: Path = request.getfixturevalue(f"{request.param.replace('-', '_')}_bf16_bundle")
    return bundle


@pytest.fixture(scope="session")
def plugin_build() -> Path:
    """The build folder of the library and its host, for one architecture and kept for next time."""
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, which builds the plugin library")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-B", BUILD, "-S", ROOT, f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}"]
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
