"""Tries one thing in a process of its own: a library that crashes there is a line of the report."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from runtime.console.children import child_environment, how_it_ended

LIMIT_S = 120
"""Seconds that a trial may take. A GPU that hangs would never end it; the slowest, loading libraries, takes a few."""

COMMAND_LIMIT_S = 600
"""Seconds for a command that loads engines and answers with them."""


class TrialError(Exception):
    """A trial that failed; the message is one line."""


def attempt(trial: str, **arguments: Any) -> Any:  # noqa: ANN401 - whatever the trial returns, as JSON has it
    """Runs a function of ``runtime.doctor.trials`` in another process and returns what it returned.

    Raises:
        TrialError: it raised, crashed, or did not end in time.
    """
    done = _run("runtime.doctor.trials", trial, json.dumps(arguments), limit_s=LIMIT_S)
    if done.returncode or not done.stdout:
        raise TrialError(f"the process that tried it {how_it_ended(done.returncode, _last(done.stderr))}")
    answer = json.loads(done.stdout)
    if "failed" in answer:
        raise TrialError(answer["failed"])
    return answer["value"]


def command(module: str, *options: str) -> str:
    """Runs one of our command lines and returns what it said last.

    Raises:
        TrialError: it failed, with its message.
    """
    done = _run(module, *options, limit_s=COMMAND_LIMIT_S)
    said = _last(done.stderr)
    if done.returncode == 2:
        raise TrialError(said.removeprefix("error: "))
    if done.returncode:
        raise TrialError(f"python -m {module} {how_it_ended(done.returncode, said)}")
    return said


def _run(module: str, *words: str, limit_s: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - our own modules
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=child_environment(),
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        raise TrialError(f"the process that tried it did not end within {limit_s} s") from None


def _last(printed: str) -> str:
    return next((line for line in reversed(printed.splitlines()) if line.strip()), "")
