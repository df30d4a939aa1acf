"""The errors that monoedge raises on purpose.

Each message is one line that says what was expected, what came and how to fix it. Command lines print it and
exit with code 2; any other exception that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class MonoedgeError(Exception):
    """Base of every error that a user can cause and fix."""


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
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: load the bundle once in each process, and begin a "
            "session for each conversation"
        )


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
