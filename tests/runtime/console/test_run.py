"""How command lines end, seen from the process that started them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
from runtime.console.run import run
from runtime.errors import MonoedgeError

def main():
    {body}

run(main)
"""


def ended(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    (folder / "command.py").write_text(SCRIPT.format(body=body))
    return subprocess.run(
        [sys.executable, "-m", "command"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("body", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_an_interrupt_is_death_by_its_signal(tmp_path: Path, body: str) -> None:
    # Inside exec() too, where CPython has its own mind about the exit code of ``python -m``.
    result = ended(tmp_path, f"print('so far'); {body}")
    assert result.returncode == -signal.SIGINT
    assert result.stdout == "so far\n"
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise MonoedgeError('no such thing')", 2, "error: no such thing\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ],
)
def test_exit_codes(tmp_path: Path, body: str, code: int, said: str) -> None:
    result = ended(tmp_path, body)
    assert (result.returncode, result.stderr) == (code, said)
