"""A terminal or pipe that a command line talks through: UTF-8 whatever the locale, and no surprises.

Answers go to stdout and everything else to stderr, so that a pipe holds nothing but answers.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from runtime.answer import Answer
from runtime.errors import MonoedgeError, OptionError

# What a terminal would act on, C0, DEL and C1, as something to look at: an answer may hold any of it, and could so
# move the cursor, rename the window or forge a prompt. Line ends and tabs are what they seem.
_VISIBLE = {
    0x7F: "␡",
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}
del _VISIBLE[ord("\n")], _VISIBLE[ord("\t")]


class Terminal:
    """stdin, stdout and stderr of this process.

    Attributes:
        interactive: a person types at stdin.
    """

    def __init__(self) -> None:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by who started this process
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - as long-lived as the process
        # A locale such as C or Latin-1 says little about a terminal of today, and nothing about a pipe.
        # Undecodable input is kept as surrogates: the tokenizer refuses them with a message.
        for stream, errors in (
            (sys.stdin, "surrogateescape"),
            (sys.stdout, "replace"),
            (sys.stderr, "backslashreplace"),
        ):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors=errors)
        self.interactive = sys.stdin is not None and sys.stdin.isatty()

    def write(self, text: str) -> None:
        """Writes a piece of an answer to stdout, at once.

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
            raise MonoedgeError(f"the answer cannot be written to stdout: {error.strerror}") from None

    def stream(self, pieces: Iterable[str]) -> None:
        """Writes an answer as it is generated, and ends its line; raises as ``write`` and ``pieces`` do."""
        begun = False
        try:
            for piece in pieces:
                begun = True
                self.write(piece)
        except BaseException:
            if begun:  # what is told next begins a line
                self.write("\n")
            raise
        self.write("\n")

    def say(self, line: str) -> None:
        """Writes a line about the conversation to stderr."""
        print(line.translate(_VISIBLE), file=sys.stderr, flush=True)  # noqa: T201 - a command line speaks

    def read_line(self, prompt: str) -> str:
        """Reads what a person types.

        Raises:
            EOFError: nothing more will come, as with Ctrl-D.
        """
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # not everywhere; input() then edits no lines
                import readline  # noqa: F401 - its import gives input() line editing
            return input(prompt)
        # Answers go elsewhere; input() would send its prompt there too.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def read_all(self) -> str:
        """Reads stdin to its end; empty when there is none.

        Raises:
            OptionError: it is not UTF-8 text.
        """
        if sys.stdin is None:
            return ""
        try:
            return sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise OptionError(
                f"expected a question in UTF-8 on stdin, got byte 0x{error.object[error.start]:02x} at "
                f"position {error.start}: an image is given with --image"
            ) from None

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A line on stderr that counts bytes up to ``total``; nothing where stderr is no terminal.

        Yields:
            What to call with the number of bytes just done.
        """
        if not sys.stderr.isatty():
            yield lambda size: None
            return
        done, shown = 0, -1

        def add(size: int) -> None:
            nonlocal done, shown
            done += size
            percent = 100 * done // max(total, 1)
            if percent != shown:
                shown = percent
                sys.stderr.write(f"\r{what}: {percent:3} % of {total / 1e6:,.0f} MB")
                sys.stderr.flush()

        try:
            yield add
        finally:
            if shown >= 0:
                self.say("")


class Interrupts:
    """What Ctrl-C does in a conversation, from here to the end of the process.

    At the prompt it raises KeyboardInterrupt; otherwise it cancels the answer at hand, or the next if there is none
    yet. An exception in the midst of a step could leave a cache half written; ``Answer.cancel`` waits for its end.
    """

    def __init__(self) -> None:
        self._raises = False
        self._requested = False
        self._answer: Answer | None = None
        signal.signal(signal.SIGINT, self._handle)

    @contextlib.contextmanager
    def at_prompt(self) -> Iterator[None]:
        """While this is entered, Ctrl-C raises KeyboardInterrupt, once."""
        self._raises = True
        self._requested, self._answer = False, None
        try:
            yield
        finally:
            self._raises = False

    def watch(self, answer: Answer) -> Answer:
        """The answer to cancel from now on, returned."""
        self._answer = answer
        if self._requested:
            answer.cancel()
        return answer

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._raises:
            # Not while that exception is dealt with: people press Ctrl-C more often than they need to.
            self._raises = False
            raise KeyboardInterrupt
        # Only once: a second signal inside cancel() would wait for a lock that the first one holds.
        first, self._requested = not self._requested, True
        if first and self._answer is not None:
            self._answer.cancel()
