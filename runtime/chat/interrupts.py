"""What Ctrl-C does in a conversation."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from runtime.answer import Answer


class Interrupts:
    """What Ctrl-C does, from here to the end of the process.

    At the prompt it raises KeyboardInterrupt; otherwise it cancels the answer at hand, or the next if there is none
    yet. An exception in the midst of a step could leave a cache half written; ``cancel`` waits for its end.
    """

    def __init__(self) -> None:
        self._raises = self._requested = False
        self._answer: Answer | None = None
        signal.signal(signal.SIGINT, self._handle)

    @contextlib.contextmanager
    def at_prompt(self) -> Iterator[None]:
        """Lets Ctrl-C raise KeyboardInterrupt, once, while this is entered."""
        self._raises = True
        self._requested, self._answer = False, None
        try:
            yield
        finally:
            self._raises = False

    def watch(self, answer: Answer) -> None:
        """Makes an answer what Ctrl-C cancels from now on."""
        self._answer = answer
        if self._requested:
            answer.cancel()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._raises:
            # Not while that exception is dealt with: people press Ctrl-C more often than they need to.
            self._raises = False
            raise KeyboardInterrupt
        # Only once: a second signal inside cancel() would wait for a lock that the first one holds.
        first, self._requested = not self._requested, True
        if first and self._answer is not None:
            self._answer.cancel()
