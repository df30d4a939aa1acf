"""The command line: its options, its files, its streams."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from runtime.doctor.__main__ import BUNDLE_VARIABLE
from runtime.loaded import BUNDLE_VARIABLE as VARIABLE

from .machines import ROOT, Machine


def names(machine: Machine) -> set[str]:
    # ONNX Runtime keeps something of its own in .cache when it is imported.
    return {item.name for item in machine.folder.iterdir()} - {".cache"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--verify",), "error: --verify is about a bundle: name it with --bundle\n"),
        (("--json", "nowhere/facts.json"), "error: --json: nowhere is not a folder: make it, or choose another\n"),
        (("--json", "."), "error: --json: . is a folder, expected the file to write\n"),
        (("--backend", "abacus"), "invalid choice: 'abacus'"),
    ],
)
def test_options_that_cannot_be(machine: Machine, options: tuple[str, ...], said: str) -> None:
    """Nothing is looked at, and nothing written."""
    done = machine.run(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert names(machine) == {"checkout", "packages", "venv"}


def test_json_has_what_the_report_says(equipped: Machine) -> None:
    file = equipped.folder / "facts.json"
    file.write_text("what was there before")
    done = equipped.run("--json", str(file))
    facts = json.loads(file.read_text())
    for step in facts["steps"]:
        assert f"\n{step['title']}\n" in done.stdout
        for finding in step["findings"]:
            mark = "!" if finding["hinders"] else " "
            line = f"\n{mark} {finding['status']:7}  {finding['what']}: {finding['found']}\n"
            assert line + (f"           → {finding['remedy']}\n" if finding["remedy"] else "") in done.stdout
    assert done.stdout.endswith(f"\n{facts['verdict']}\n")
    assert facts["well"] is (done.returncode == 0)
    assert names(equipped) == {"checkout", "facts.json", "packages", "venv"}


@pytest.mark.parametrize(("target", "code"), [("| true", 0), ("> /dev/full", 2)])
def test_a_reader_that_leaves_and_a_full_disk(machine: Machine, target: str, code: int) -> None:
    """As of every command line: no traceback."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{machine.python} -m runtime.doctor {target}"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **machine.variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_the_variable_is_that_of_all_commands() -> None:
    assert BUNDLE_VARIABLE == VARIABLE
