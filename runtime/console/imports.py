"""Ctrl-C while a command line is still importing: it ends it without a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

_PACKAGES = {"runtime", "export", "calibration", "plugins_trt"}


def tell_interrupts_briefly() -> None:
    """Makes an interrupt that nobody catches one line, if this process runs one of our command lines.

    Called before anything that takes time to import; ``runtime.console.run`` takes over when ``main`` begins. Python
    dies by the signal after it, as after any KeyboardInterrupt that nobody catches.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    if module.partition(".")[0] in _PACKAGES or Path(words[1] if words[1:] else "").stem == "monoedge":
        sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)  # noqa: T201 - a command line speaks
    else:
        sys.__excepthook__(kind, error, trace)
