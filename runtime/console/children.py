"""Processes of our own packages that a command line starts, and how they ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def child_environment() -> dict[str, str]:
    """Returns this process's environment, in which Python finds our packages where they are."""
    ours = str(Path(__file__).absolute().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))}


def how_it_ended(code: int, reason: str) -> str:
    """Says in one line how a process ended: ``ended with SIGABRT: terminate called …``."""
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return " ".join(f"ended with {name}{': ' if reason else ''}{reason}".split())
