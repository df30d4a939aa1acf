"""A short part of what ``benchmarks/robustness/fuzz.py`` does: hostile inputs are taken, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNTS = {"bundles": 40, "checkpoints": 60, "pictures": 300, "prompts": 400, "options": 3000, "data": 1000}


@pytest.mark.parametrize("kind", COUNTS)
def test_hostile_inputs(shapes_bundle: Path, kind: str) -> None:
    command = [sys.executable, ROOT / "benchmarks/robustness/fuzz.py", "--bundle", shapes_bundle]
    command += ["--ckpt", ROOT / "examples/shapes/checkpoint", "--kind", kind, "--count", str(COUNTS[kind])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert f"{kind}: {COUNTS[kind]} inputs, 0 faults" in result.stdout
