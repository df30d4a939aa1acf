"""What the tests of engines share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def bundle(tiny_v1_bf16_bundle: Path, tmp_path: Path) -> Path:
    """A bf16 bundle of the test's own, to write to."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_v1_bf16_bundle, folder)
    return folder
