"""What all command lines share: errors as one line and exit code 2, interruption without a traceback."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from runtime.errors import MonoedgeError


def run(main: Callable[[], None]) -> None:
    """Runs a command line's ``main`` and exits.

    Exit codes: 0; 2 for an error that the user can mend, told in one line; 130, as shells tell the death by SIGINT,
    when interrupted; 143 when ended.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except MonoedgeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a command line speaks
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        _die_of_interrupt()
    except BrokenPipeError:
        # Whoever read our output has enough; flushing the rest at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def need(extra: str, *modules: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Raises:
        MonoedgeError: one is missing, with the command that adds it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MonoedgeError(f"{module} is not installed; this adds it: pip install 'monoedge[{extra}]'")


def say(line: str) -> None:
    """Tells people a line, on stderr: stdout is for what was asked for."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def bar_options(pause: float = 10.0) -> dict[str, Any]:
    """What all progress bars of tqdm are made with: on stderr, a state every ``pause`` seconds in a file.

    A log file keeps every state of a bar, a terminal only the last.
    """
    return {"file": sys.stderr, "mininterval": 0.1 if sys.stderr.isatty() else pause}


def _die_of_interrupt() -> NoReturn:
    # By the signal itself, which stops a shell's loop too. Python does the same, but only sometimes: when the
    # interrupt fell into code that exec() runs (CPython's unhandled_keyboard_interrupt), whatever exit code is asked.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    os._exit(130)  # the signal is blocked


def _terminate(signum: int, frame: FrameType | None) -> None:
    # As an exception, so that unfinished output is cleaned up.
    sys.exit(128 + signum)
