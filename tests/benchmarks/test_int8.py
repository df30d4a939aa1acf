"""The script of the accuracy table runs, on a few questions; its figures are for docs, not for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_every_row(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/int8.py", "--pictures", "6", "--questions", "4", "--json", tmp_path / "raw"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "raw").read_text())
    names = [f"{row['mode']}: {row['name']}" for row in rows]
    assert {"w8a16: ours", "w8a8: ours", "w8a16: ours, everything quantized", "w8a8: onnxruntime, minmax"} <= set(names)
    assert all(row["figures"]["all"]["questions"] == 4 for row in rows)
    assert all(row["figures"]["all"]["mean_kl"] > 0 for row in rows)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
