"""How command lines end, seen from the process that started them."""

import os
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
        ("open('nowhere/at all')", 2, "error: nowhere/at all: No such file or directory\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGHUP)", 129, ""),
    ],
)
def test_exit_codes(tmp_path: Path, body: str, code: int, said: str) -> None:
    result = ended(tmp_path, body)
    assert (result.returncode, result.stderr) == (code, said)


INTERRUPT = """
import sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "{module}":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        *(
            (["-m", command], module)
            for module in ("numpy", "runtime.errors")
            for command in ("export.onnx", "calibration", "runtime.chat", "runtime.bench")
        ),
        # These import numpy once their options are right.
        (["-m", "export.engine"], "runtime.errors"),
        (["-m", "plugins_trt.build"], "runtime.errors"),
        (["-m", "runtime.doctor"], "runtime.errors"),
        ([str(Path(sys.executable).with_name("monoedge")), "chat"], "numpy"),
    ],
    ids=lambda value: value if isinstance(value, str) else Path(value[-1]).name,
)
def test_an_interrupt_while_importing_is_one_line(tmp_path: Path, command: list[str], module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module=module))
    if not command[0].startswith("-") and not Path(command[0]).exists():
        pytest.skip("the script monoedge is not installed")
    result = subprocess.run(
        [sys.executable, *command],
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "interrupted\n")


@pytest.mark.parametrize("command", [["onnx", "--help"], ["engine", "--bundle", "b", "--target", "trt"]])
def test_a_module_run_by_its_path_says_how_to_run_it(command: list[str]) -> None:
    name, *options = command
    result = subprocess.run(
        [sys.executable, ROOT / f"export/{name}.py", *options],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: run it as a module: python -m export.onnx")


def test_nohup_is_heeded(tmp_path: Path) -> None:
    """``nohup`` starts a command with SIGHUP ignored, so that it outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = ended(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('went on')")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.returncode, result.stdout) == (0, "went on\n")


def test_cleaning_up_is_not_cut_short(tmp_path: Path) -> None:
    """A terminal that is closed sends SIGHUP more than once."""
    body = (
        "import os, signal\n    try: os.kill(os.getpid(), signal.SIGHUP)\n"
        "    finally: os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGTERM); print('clean')"
    )
    result = ended(tmp_path, body)
    assert (result.returncode, result.stdout) == (129, "clean\n")
