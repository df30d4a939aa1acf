"""What all command lines share: errors as one line and exit code 2, interruption without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import runtime
from runtime.errors import MonoedgeError, visible
from runtime.packages import install_command

MOST = 1_000_000
"""Of what an option counts, where nothing else bounds it: more is a mistake, and nobody would see its end."""


def run(main: Callable[[], None]) -> None:
    """Runs a command line's ``main`` and exits.

    Exit codes: 0; 2 for an error that the user can mend, told in one line; 130, as shells tell the death by SIGINT,
    when interrupted; 143 when ended, and 129 when its terminal is closed.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not below nohup
        signal.signal(signal.SIGHUP, _terminate)
    _use_utf8()
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
    except OSError as error:
        # A path that a user named, such as one below a folder that may not be read. Others are ours to mend.
        if error.filename is None:
            raise
        print(f"error: {visible(f'{error.filename}: {error.strerror}')}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def make_parser(module: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """Makes the parser of a command line, with ``--version``.

    Args:
        module: what ``python -m`` runs. ``monoedge COMMAND`` is called by that name instead.
        description: what ``--help`` says, line by line as it stands.
        usage: instead of the one made from the options; ``%(prog)s`` stands for the name.
    """
    called = sys.argv[0] if sys.argv[0].startswith("monoedge ") else f"python -m {module}"
    parser = argparse.ArgumentParser(
        prog=called, usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"monoedge {runtime.__version__}")
    return parser


def need(*modules: str) -> None:
    """Checks that packages are installed, without importing them.

    Raises:
        MonoedgeError: one is missing, with the command that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            command = install_command(module.replace("_", "-"))
            raise MonoedgeError(f"{module} is not installed; this installs it: {command}")


def _use_utf8() -> None:
    """Sets up the standard streams: open, and in UTF-8 whatever the locale."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - as long-lived as the process
    # A locale such as C or Latin-1 says little about a terminal of today, and nothing about a pipe.
    # Undecodable input is kept as surrogates: the tokenizer refuses them with a message.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _die_of_interrupt() -> NoReturn:
    # By the signal itself, which stops a shell's loop too. Python does the same, but only sometimes: when the
    # interrupt fell into code that exec() runs (CPython's unhandled_keyboard_interrupt), whatever exit code is asked.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    os._exit(130)  # the signal is blocked


def _terminate(signum: int, frame: FrameType | None) -> None:
    # As an exception, so that unfinished output is cleaned up, which no second signal is to cut short: who closes a
    # terminal sends several.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(128 + signum)
