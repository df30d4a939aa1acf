"""What a command line shows: answers on stdout, everything else on stderr, so that a pipe holds nothing but answers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from runtime.errors import VISIBLE, MonoedgeError

T = TypeVar("T")

Advance = Callable[[int], object]
"""Moves a progress bar on by so many."""

_VISIBLE = {code: shown for code, shown in VISIBLE.items() if chr(code) not in "\n\t"}
"""Line ends and tabs are what they seem."""


class Console:
    """stdout and stderr of a command line.

    Args:
        shows: whether lines and bars are shown on stderr; ``SILENT`` shows none.
    """

    bars_in_logs = True
    """Whether bars are shown where stderr is no terminal."""

    def __init__(self, shows: bool = True) -> None:
        self._shows = shows

    def say(self, line: str) -> None:
        """Writes a line to stderr."""
        if self._shows:
            print(line.translate(_VISIBLE), file=sys.stderr, flush=True)  # noqa: T201 - a command line speaks

    def write(self, text: str) -> None:
        """Writes text to stdout, at once.

        Raises:
            BrokenPipeError: the reader has gone.
            MonoedgeError: stdout cannot be written to, such as a file on a full disk.
        """
        try:
            sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        except OSError as error:
            # What could not be written is tried again at exit, which would end in a message and exit code 120.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise
            raise MonoedgeError(f"stdout cannot be written to: {error.strerror}") from None

    @contextlib.contextmanager
    def bar(self, name: str, total: int, unit: str = "it") -> Iterator[Advance]:
        """Shows a progress bar over ``total``, bytes if ``unit`` is ``B``; yields what to call with the number done."""
        if not self._shows:
            yield lambda count: None
            return
        hidden = None if not self.bars_in_logs else False  # None hides it where stderr is no terminal
        with _tqdm(total=total, desc=name, unit=unit, unit_scale=unit == "B", disable=hidden) as bar:
            yield bar.update

    def track(self, items: Iterable[T], name: str, total: int, unit: str = "it", done: int = 0) -> Iterator[T]:
        """Yields items, with a progress bar over ``total`` of them, of which ``done`` are done already."""
        yield from _tqdm(items, desc=name, total=total, unit=unit, initial=done) if self._shows else items

    @contextlib.contextmanager
    def phases(self, name: str) -> Iterator[Callable[[str, float], None]]:
        """Shows a progress bar over work whose size nobody knows before; none where nobody watches.

        Yields:
            What to call with the name of the phase at hand, and the fraction of the work that is done.
        """
        if not self._shows:
            yield lambda phase, fraction: None
            return
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
        with _tqdm(total=100, desc=name, bar_format=form, disable=None, leave=False) as bar:

            def tell(phase: str, fraction: float) -> None:
                bar.set_postfix_str(phase, refresh=False)
                # A phase that begins may be counted back.
                bar.update(max(100 * fraction - bar.n, 0))

            yield tell


SILENT = Console(shows=False)
"""For work that no person watches."""


def _tqdm(*items: Any, **options: Any) -> Any:  # noqa: ANN401 - tqdm has no types
    # Imported here: an app that only answers shows no bar.
    from tqdm import tqdm

    # A log file keeps every state of a bar, a terminal only the last.
    return tqdm(*items, file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 10, **options)
