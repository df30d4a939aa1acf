"""A terminal or pipe that questions come from and answers go to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

from runtime.console.console import Console
from runtime.errors import OptionError


class Terminal(Console):
    """stdin, stdout and stderr of this process.

    Attributes:
        interactive: a person types at stdin.
    """

    bars_in_logs = False

    def __init__(self) -> None:
        super().__init__()
        self.interactive = sys.stdin is not None and sys.stdin.isatty()

    def stream(self, pieces: Iterable[str]) -> None:
        """Writes an answer as it is generated, and ends its line; raises as ``write`` and ``pieces`` do."""
        begun = False
        try:
            for piece in pieces:
                begun = True
                self.write(piece)
        except BaseException:
            if begun:  # the error's message begins a line
                self.write("\n")
            raise
        self.write("\n")

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
