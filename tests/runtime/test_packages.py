"""What is said where a package is missing, in environments that really lack it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from runtime.packages import install_command, requirement

from .doctor.machines import checkout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin/python"


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    ours = cwd / "checkout"
    environment = {**os.environ, "PYTHONPATH": str(ours if ours.exists() else checkout(ours))}
    return subprocess.run([python, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["runtime.chat", "runtime.bench", "calibration"])
def test_a_command_without_numpy_is_one_line(bare: Path, module: str, tmp_path: Path) -> None:
    done = run(bare, "-m", module, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: numpy is not installed; this installs it: pip install numpy")
    assert done.stderr.count("\n") == 1


def test_what_needs_no_package_is_there_without_any(bare: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runtime, runtime.console.files\n"
        "from runtime.backends.cuda.driver import find_device\n"
        "from runtime.backends.plugin_library import cache_folder\n"
        "print('Session' in dir(runtime), hasattr(runtime, 'nothing'))\n"
        "try: runtime.Session\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
    )
    done = run(bare, "-c", code, cwd=tmp_path)
    assert done.stdout == "True False\nnumpy\n", done.stderr


@pytest.mark.parametrize(
    ("version", "expected"), [((3, 10), "onnxruntime>=1.19,<1.25"), ((3, 11), "onnxruntime>=1.25")], ids=str
)
def test_bounds_are_those_of_this_python(
    version: tuple[int, int], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of pyproject.toml, as a wheel's metadata has them."""
    (tmp_path / "monoedge-9.dist-info").mkdir()
    (tmp_path / "monoedge-9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: monoedge\nVersion: 9\n"
        'Requires-Dist: onnxruntime<1.25,>=1.19; python_version < "3.11" and extra == "cpu"\n'
        'Requires-Dist: onnxruntime>=1.25; python_version >= "3.11" and extra == "cpu"\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    assert set(requirement("onnxruntime").removeprefix("onnxruntime").split(",")) == set(
        expected.removeprefix("onnxruntime").split(",")
    )
    assert install_command("nothing-known") == "pip install nothing-known"
    assert metadata.version("monoedge") == "9"
