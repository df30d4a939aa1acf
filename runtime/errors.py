"""The errors that monoedge raises on purpose.

Each message is one line that says what was expected, what came and how to fix it. Command lines print it and
exit with code 2; any other exception that escapes is a bug.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

LONGEST = 2000
"""Characters of a message, which may have to quote what a stranger wrote."""


VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    0x7F: "␡",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    **{
        code: f"<U+{code:04X}>"
        for code in (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
}
"""What a terminal would act on as something to look at: C0, DEL, C1, the ends of lines and what turns the direction of
text. Strangers' text may hold any of it, and could so move the cursor, rename the window or forge a line."""


def visible(text: str) -> str:
    """Returns text as one line of bounded length, in which everything can be seen."""
    text = re.sub(r"[^\s/]{201,}", lambda found: f"{found[0][:160]}…{found[0][-40:]}", text)  # no path: a value
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return text.encode(errors="backslashreplace").decode().translate(VISIBLE)


class MonoedgeError(Exception):
    """Base of every error that a user can cause and fix."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class BundleError(MonoedgeError):
    """A bundle that is missing, incomplete, altered, or of another format version."""


class ImageError(MonoedgeError):
    """An image that cannot be read, or of an unsupported type or shape."""


class PromptError(MonoedgeError):
    """A prompt that does not fit its images or the cache."""


class OptionError(MonoedgeError):
    """An option out of range, or one that contradicts another."""


class BackendError(MonoedgeError):
    """A backend that is not installed or cannot run this bundle."""


class NotCopied:
    """Base of what holds caches or open files, which a copy would share: ``copy`` and ``pickle`` are refused."""

    def __reduce__(self) -> NoReturn:
        remedy = "load the bundle once in each process, and begin a session for each conversation"
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: {remedy}")


@contextmanager
def as_backend_error(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turns an error of a backend's library into one line of ours.

    Args:
        what: what failed; the line begins with it.
        kind: the library's errors. ONNX Runtime's have no base of their own.

    Raises:
        BackendError: ``what``, and the library's own words.
    """
    try:
        yield
    except kind as error:
        raise BackendError(f"{what}: {' '.join(str(error).split())}") from None
