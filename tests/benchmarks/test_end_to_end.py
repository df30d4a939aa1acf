"""The benchmark runs and reports; what it measures is not a test's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "golden" / "tiny-v15" / "checkpoint"


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "end_to_end.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory with /proc")
def test_it_measures_from_checkpoint_to_answer(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    raw = tmp_path / "raw.json"
    options = ["--new-tokens", "4", "--runs", "1", "--scratch", str(scratch), "--json", str(raw)]
    done = run("--ckpt", str(CHECKPOINT), *options)
    assert done.returncode == 0, done.stderr
    assert "first token, s" in done.stdout
    results = json.loads(raw.read_text())
    assert results["export"]["peak_bytes"] > 1e8
    assert [session["cold"] for session in results["sessions"]] == [True, False]
    for session in results["sessions"]:
        for answer in session["answers"]:
            assert (answer["generated_tokens"], answer["reused_tokens"], answer["visual_tokens"]) == (4, 0, 256)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected --ckpt or --bundle"),
        (["--bundle", "b", "--runs", "0"], "--runs of at least 1"),
        (["--bundle", "no-such-bundle"], "error: no-such-bundle: no such bundle"),
        (["--bundle", "b", "--scratch", "no-such-folder"], "error: --scratch: no-such-folder is not a folder"),
        (["--bundle", "b", "--json", "no-such-folder/x"], "error: --json: no-such-folder is not a folder"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory with /proc")
def test_mistakes_are_told_in_one_line(tmp_path, arguments, told):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
