"""Files and folders put in place: whole, by one step, and nothing of others touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.console import rename
from runtime.console.files import new_folder, put_in_place, replaced, work_folder
from runtime.errors import OptionError

ROOT = Path(__file__).parents[3]
KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.console.files import work_folder
with work_folder(Path(sys.argv[1])) as folder:
    (folder / "new").mkdir()
    (folder / "new/part").write_text("half")
    {body}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def killed(target: Path, body: str = "pass") -> None:
    """Leaves what a run leaves that is killed while it makes ``target``."""
    script = KILLED.format(body=body)
    done = subprocess.run([sys.executable, "-c", script, str(target)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(params=["renameat2", "without renameat2"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that can exchange two folders in one step, and one that cannot."""
    if request.param == "without renameat2":
        monkeypatch.setattr(rename, "_RENAMEAT2", None)


@pytest.mark.usefixtures("system")
def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def make() -> None:
        with new_folder(target):
            target.mkdir()
            (target / "photo").write_text("dear")

    with pytest.raises(OptionError, match="exists already"):
        make()
    assert (target / "photo").read_text() == "dear"
    assert names(tmp_path) == ["made"]


@pytest.mark.usefixtures("system")
def test_of_two_that_make_one_folder_one_is_told(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def make() -> None:
        with new_folder(target) as first:
            (first / "who").write_text("first")
            with new_folder(target) as second:
                (second / "who").write_text("second")

    with pytest.raises(OptionError, match="exists already"):
        make()
    assert (target / "who").read_text() == "second"
    assert names(tmp_path) == ["made"]


@pytest.mark.usefixtures("system")
def test_exchanged(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "old").write_text("old")
    with work_folder(target) as folder:
        made = folder / "new"
        made.mkdir()
        (made / "new").write_text("new")
        put_in_place(made, target, lambda path: True)
        assert names(made) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["made"]


@pytest.mark.usefixtures("system")
def test_what_comes_in_between_is_put_back(tmp_path: Path) -> None:
    """Seen as ours, then replaced by another's before the exchange."""
    target, answers = tmp_path / "made", iter([True, False])
    target.mkdir()
    (target / "photo").write_text("dear")
    with work_folder(target) as folder:
        (folder / "new").mkdir()
        with pytest.raises(FileExistsError):
            put_in_place(folder / "new", target, lambda path: next(answers))
    assert (target / "photo").read_text() == "dear"
    assert names(tmp_path) == ["made"]


def test_a_name_is_never_empty_while_a_folder_is_replaced(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom runtime.console.files import put_in_place, work_folder\n"
        "target = Path(sys.argv[1])\n"
        "for number in range(300):\n"
        "    with work_folder(target) as folder:\n"
        "        (folder / 'new').mkdir()\n"
        "        (folder / 'new/file').write_text(str(number))\n"
        "        put_in_place(folder / 'new', target, lambda path: True)\n"
    )
    target = tmp_path / "made"
    target.mkdir()
    (target / "file").write_text("first")
    with subprocess.Popen([sys.executable, "-c", script, str(target)], cwd=ROOT) as process:
        while process.poll() is None:
            assert (target / "file").read_text()
    assert process.returncode == 0
    assert (target / "file").read_text() == "299"


@pytest.mark.parametrize("use", [replaced, new_folder, work_folder])
def test_leftovers_of_killed_runs_go_with_the_next(tmp_path: Path, use: type) -> None:
    target = tmp_path / "made"
    killed(target)
    killed(tmp_path / "made too")
    assert len(names(tmp_path)) == 2
    with use(target) as path:
        if use is replaced:
            path.write_text("whole")
        left = [name for name in names(tmp_path) if not name.startswith(".made too")]
        assert len(left) == 1
    # Another target's are left to it.
    assert [name for name in names(tmp_path) if name.startswith(".made too.")]


def test_what_another_run_makes_stays(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with work_folder(target) as first:
        (first / "part").write_text("half")
        with work_folder(target):
            pass
        assert (first / "part").read_text() == "half"


def test_what_a_killed_run_had_moved_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames that stand for an exchange: the only whole copy lies in its hidden folder."""
    target = tmp_path / "made"
    target.mkdir()
    (target / "file").write_text("good")
    killed(target, "Path(sys.argv[1]).rename(folder / 'old')")
    assert not target.exists()
    with pytest.raises(OptionError, match="exists already"), new_folder(target):
        pass
    assert (target / "file").read_text() == "good"
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replaced(tmp_path / "file") as path:
            path.write_text("x")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_is_put_in_place_is_on_the_disk(tmp_path: Path) -> None:
    """As the system calls tell: each file and folder is flushed before the name changes, its parent after."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed, which shows system calls")
    script = (
        "import sys\nfrom pathlib import Path\nfrom runtime.console.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n    (folder / 'file').write_text('x')\n"
    )
    log = tmp_path / "log"
    command = [
        "strace",
        "-y",
        "-e",
        "trace=fsync,renameat2",
        "-o",
        log,
        sys.executable,
        "-c",
        script,
        tmp_path / "made",
    ]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    calls = [line.split("(")[0] for line in log.read_text().splitlines() if "(" in line]
    assert calls == ["fsync", "fsync", "renameat2", "fsync"]


def test_one_at_a_time(tmp_path: Path) -> None:
    """Processes that each read a number and write the next: none is lost."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom runtime.console.files import alone, replaced\n"
        "file = Path(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with alone(file.parent), replaced(file) as new:\n"
        "        new.write_text(str(int(file.read_text()) + 1))\n"
    )
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", script, str(tmp_path / "number")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "150"
