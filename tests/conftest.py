"""Bundles that several tests share, exported once a run by the command that users run."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.onnx import main

ROOT = Path(__file__).resolve().parent.parent


def _export(checkpoint: Path, target: Path) -> Path:
    main(["--ckpt", str(checkpoint), "-o", str(target)])
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
