"""``monoedge``, as it is called from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from runtime.console.monoedge import COMMANDS

ROOT = Path(__file__).resolve().parents[3]


def monoedge(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from runtime.console.monoedge import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_it_lists_its_commands(arguments: tuple[str, ...]) -> None:
    result = monoedge(*arguments)
    assert result.returncode == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_version() -> None:
    assert monoedge("--version").stdout == f"monoedge {runtime.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_its_module(command: str) -> None:
    name = COMMANDS[command][0].removesuffix(".__main__")
    for option in ("--help", "--version"):
        ours, theirs = monoedge(command, option), module(name, option)
        assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr + theirs.stderr
        if option == "--help":
            assert ours.stdout.startswith(f"usage: monoedge {command} ")
            assert theirs.stdout.startswith(f"usage: python -m {name} ")
        else:
            assert ours.stdout == theirs.stdout == f"monoedge {runtime.__version__}\n"


def test_an_error_is_one_line_and_exit_code_2() -> None:
    for arguments, expected in ((("bake",), "there is no command 'bake', expected one of: "), (("chat",), "")):
        result = monoedge(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {expected}")
        assert result.stderr.count("\n") == 1


def test_it_is_light() -> None:
    code = (
        "import sys, runtime.console.monoedge; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr
