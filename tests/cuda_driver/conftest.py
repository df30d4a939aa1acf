"""Runs the tests of this folder in processes of their own, on the driver that ``building`` compiles.

A process finds the driver by ``LD_LIBRARY_PATH``, which must be set before it starts, and other tests must find none.
So each test file here runs in a child pytest, once a run, whichever process asks first; the child's reports are shown
as if the tests had run where they were asked for. Test files are imported outside the child too, where there is no
PyCUDA: they import what needs it in fixtures and tests. A file that needs more than PyCUDA defines
``child_paths() -> dict[str, list[Path]]``, which the outer process calls: folders to put in front, by variable.

In the child, each test ends with no complaint of the driver and with nothing left on the device.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT, alone
from .building import PACKAGES, build_driver, missing
from .devices import new
from .driver_reports import Driver
from .models import open_model

__all__ = ["new", "open_model"]
"""Fixtures of all files here."""

HERE = Path(__file__).resolve().parent
REPORTS = "MONOEDGE_CUDA_DRIVER_REPORTS"
"""In the child: the file to write reports to."""
BUNDLES = "MONOEDGE_CUDA_DRIVER_BUNDLES"
"""In the child: the folder of the outer run's bundles."""
IN_CHILD = REPORTS in os.environ

_PASSED = pytest.StashKey[bool]()


# The outer process --------------------------------------------------------------------------------------------------


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if IN_CHILD or not item.path.is_relative_to(HERE):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    """What the child said of a test, or why it did not come to it."""
    reason = missing()
    if reason is not None:
        return [_report(item, "skipped", reason)]
    try:
        file = _run_child(item)
    except pytest.skip.Exception as skipped:
        return [_report(item, "skipped", str(skipped))]
    hook, found = item.config.hook, []
    for line in file.read_text().splitlines():
        data = json.loads(line)
        if data["nodeid"] == item.nodeid:
            found.append(hook.pytest_report_from_serializable(config=item.config, data=data))
    if not any(report.when == "teardown" for report in found):
        found.append(_report(item, "failed", f"the child ended early:\n{file.with_suffix('.log').read_text()}"))
    return found


def _report(item: pytest.Item, outcome: Any, why: str) -> pytest.TestReport:
    path, line, _ = item.location
    longrepr: Any = (path, line, f"Skipped: {why}") if outcome == "skipped" else why
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "setup")


def _run_child(item: pytest.Item) -> Path:
    """Runs the tests of a file that were chosen, unless another process did; returns the file with the reports."""
    base = item.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    run = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    file = run / "cuda_driver" / f"{item.path.stem}.jsonl"
    with alone(file):
        if not file.exists():
            chosen = [other.nodeid for other in item.session.items if other.path == item.path]
            made = file.with_suffix(".part")
            made.touch()
            result = subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *_options(file), *chosen],
                cwd=item.config.rootpath,
                env=_environment(item) | {REPORTS: str(made), BUNDLES: str(run / "bundles")},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            file.with_suffix(".log").write_text(f"{result.stdout}\nexit code {result.returncode}\n")
            made.rename(file)
    return file


def _options(file: Path) -> list[str]:
    return [f"--basetemp={file.with_suffix('')}", f"--rootdir={ROOT}", "--tb=short"]


def _environment(item: pytest.Item) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    more = getattr(getattr(item, "module", None), "child_paths", dict)()
    paths = {"LD_LIBRARY_PATH": [build_driver()], "PYTHONPATH": [PACKAGES, ROOT]}
    for name in paths.keys() | more.keys():
        before = [environment[name]] if environment.get(name) else []
        environment[name] = os.pathsep.join(map(str, [*more.get(name, []), *paths.get(name, []), *before]))
    return environment


# The child ----------------------------------------------------------------------------------------------------------


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    # What a failed test leaves is held by its traceback.
    if call.when == "call":
        item.stash[_PASSED] = call.excinfo is None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if IN_CHILD:
        data = _CONFIG[0].hook.pytest_report_to_serializable(config=_CONFIG[0], report=report)
        with Path(os.environ[REPORTS]).open("a") as file:
            file.write(json.dumps(data) + "\n")


_CONFIG: list[pytest.Config] = []


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    _CONFIG[:] = [config]


@pytest.fixture(scope="session")
def bundles() -> Path:
    """The folder of the outer run's bundles, for each is exported once."""
    return Path(os.environ[BUNDLES])


@pytest.fixture
def driver() -> Iterator[Driver]:
    """The driver, to be asked and ordered."""
    driver = Driver()
    yield driver
    driver.fail(None)
    driver.set_memory()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a test that passed, and its fixtures, the driver has no complaint, and nothing is left on the device.

    One retain of the primary context may stay: the process keeps it.
    """
    result = yield
    if IN_CHILD and item.stash.get(_PASSED, False):
        # pytest keeps them longer than the fixtures.
        item.funcargs.clear()  # type: ignore[attr-defined]
        gc.collect()
        driver = Driver()
        assert driver.take_complaints() == []
        left = driver.alive()
        assert left.pop("retains", 0) <= 1
        assert left == {}
    return result
