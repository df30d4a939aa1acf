"""Python and its packages: what is there, missing, broken, doubled, too old."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from runtime.doctor.host import PYTHONS, disk
from runtime.doctor.report import OK, WRONG

from .machines import BASE, ROOT, Machine


def test_this_machine_whatever_it_has(tmp_path: Path) -> None:
    """Every line has its status, and what to do where it is not ok; the last one is the verdict."""
    command = [sys.executable, "-m", "runtime.doctor"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    head, *steps, last = done.stdout.rstrip().split("\n\n")
    assert re.match(r"monoedge \S+, .* UTC: can backend \S+ answer here\?\n", head)
    lines = [line for step in steps for line in step.splitlines()[1:]]
    assert all(re.match(r"[ !] (ok     |missing|wrong  )  \S.*: \S|           → \S", line) for line in lines), lines
    marked = sum(line.startswith("!") for line in lines)
    assert done.returncode == (1 if marked else 0)
    assert last.startswith(f"verdict: {f'{marked} thing' if marked else 'nothing that was found keeps'}")


def test_an_empty_environment(machine: Machine) -> None:
    report = machine.doctor("--bundle", "bundle")
    assert (report.code, report.errors) == (1, "")
    assert report.facts["backend"] == "onnxruntime"
    for package in ("numpy", "pillow", "tokenizers", "tqdm", "onnxruntime"):
        assert report.said("packages", package) == ("missing", "not installed", f"pip install {package}")
        assert f"! missing  {package}: not installed\n           → pip install {package}\n" in report.text
    assert report.said("bundle", "files") == (
        "missing",
        "not looked at: No module named 'numpy'",
        "install the packages above first",
    )
    assert report.said("Python", "pip")[2].startswith("python -m ensurepip --default-pip")
    assert report.said("Python", "monoedge")[2] == f"pip install -e {ROOT}"
    assert report.text.endswith(
        "\nverdict: 6 things keep backend onnxruntime from answering from bundle here: packages, numpy; packages, "
        "pillow; packages, tokenizers; packages, tqdm; packages, onnxruntime; bundle, files\n"
    )
    # What it names is what is missing: with that, it is well.
    machine.install(*BASE, "onnxruntime")
    report = machine.doctor()
    assert (report.code, report.errors) == (0, "")
    assert report.text.endswith("\nverdict: nothing that was found keeps backend onnxruntime from answering here\n")


def test_the_shell_has_the_pip_of_another_python(machine: Machine) -> None:
    """As long as the environment is not activated. What each remedy does is done."""
    binaries = machine.folder / "venv/bin"
    subprocess.run([binaries / "python", "-m", "ensurepip", "--default-pip"], check=True, capture_output=True)
    other = Machine(machine.folder / "other")
    subprocess.run([other.python, "-m", "ensurepip", "--default-pip"], check=True, capture_output=True)
    place = next(other.folder.glob("venv/lib/python*/site-packages/pip"))
    status, found, remedy = machine.doctor(PATH=f"{other.python.parent}:/usr/bin:/bin").said("Python", "pip")
    assert (status, found) == ("wrong", f"the shell's is {place}, which is not this Python's")
    assert remedy == f". {binaries / 'activate'}, or {binaries / 'python'} -m pip in the place of pip"
    path = subprocess.run(
        ["bash", "-c", f". {binaries / 'activate'} && printf %s $PATH"], capture_output=True, text=True, check=True
    ).stdout
    assert machine.doctor(PATH=path).said("Python", "pip")[0] == "ok"


def test_packages_that_fail(equipped: Machine) -> None:
    (equipped.packages / "tokenizers").unlink()
    (equipped.packages / "tokenizers.py").write_text(
        "import os, sys; print('no such CPU', file=sys.stderr); os.abort()\n"
    )
    (equipped.packages / "tqdm").unlink()
    (equipped.packages / "tqdm.py").write_text("import nothing_like_it\n")
    report = equipped.doctor()
    assert report.code == 1
    status, found, remedy = report.said("packages", "tokenizers")
    assert status == "wrong"
    assert found.endswith("the process that tried it ended with SIGABRT: no such CPU")
    assert remedy == "pip install tokenizers --force-reinstall"
    assert report.said("packages", "tqdm")[1].endswith(": cannot be imported: No module named 'nothing_like_it'")
    assert report.said("packages", "numpy")[0] == "ok"


def test_two_onnxruntimes_in_one_folder(equipped: Machine) -> None:
    equipped.package("onnxruntime-gpu", "1.30.0", "onnxruntime")
    report = equipped.doctor()
    assert report.code == 1
    status, found, remedy = report.said("packages", "onnxruntime")
    assert status == "wrong"
    assert re.fullmatch(
        r"onnxruntime \S+ and onnxruntime-gpu 1.30.0 share one folder, where each overwrites the other", found
    )
    assert remedy == (
        "pip uninstall -y onnxruntime onnxruntime-gpu, then one of them again: pip install onnxruntime, or for its "
        "backends on a GPU pip install onnxruntime-gpu"
    )


def test_versions_are_held_against_the_bounds_of_monoedge(equipped: Machine) -> None:
    equipped.package("monoedge", "0.1.0", "runtime", needs="Requires-Dist: numpy>=99.1\nRequires-Dist: pillow>=1.0\n")
    report = equipped.doctor()
    status, found, remedy = report.said("packages", "numpy")
    assert (status, remedy) == ("wrong", "pip install 'numpy>=99.1' -U")
    assert found.endswith("; expected >=99.1")
    assert report.said("packages", "pillow")[0] == "ok"
    assert report.said("Python", "monoedge")[0] == "ok"


def test_the_versions_of_python_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (first, last) = (".".join(map(str, version)) for version in (PYTHONS[0], (PYTHONS[1][0], PYTHONS[1][1] + 1)))
    assert f'requires-python = ">={first},<{last}"' in text
    assert f"needs Python {first} or later" in Path(runtime.__file__).read_text()


def test_an_older_python_is_refused_in_one_line(tmp_path: Path) -> None:
    older = sorted((Path.home() / ".pyenv/versions").glob("3.[6-9].*/bin/python"))
    if not older:
        pytest.skip("no Python before 3.10 is installed below ~/.pyenv")
    for python in older:
        done = subprocess.run(
            [python, "-m", "runtime.doctor"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: monoedge needs Python 3.10 or later, this is 3.")
        assert done.stderr.count("\n") == 1


def test_a_small_disk(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    monkeypatch.setattr("tempfile.tempdir", None)
    caches, temporary = disk(None)
    assert (caches.status, caches.remedy) == (WRONG, "free some space, or set XDG_CACHE_HOME")
    assert caches.found == f"{small_disk}/monoedge: 0.0 GB free"
    assert temporary.status == OK
    # As the remedy says.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert next(disk(None)).status == OK
