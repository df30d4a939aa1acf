"""Answers about images from a bundle: ``runtime.Session(image, prompt)``.

Needs numpy, pillow, tokenizers and tqdm, which are imported when a name that needs them is first used: so that
``runtime.doctor`` can say which of them are missing. A backend's own packages are imported when it is chosen.
"""

# ruff: noqa: E402 - a command line may be interrupted while it imports what is below

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - older ones cannot read what follows, and pip is not asked in a checkout
    _REASON = "monoedge needs Python 3.10 or later, this is {}.{}: make an environment with one".format(
        *sys.version_info
    )
    if sys.argv[:1] == ["-m"]:
        print("error: " + _REASON, file=sys.stderr)  # noqa: T201 - a command line speaks
        sys.exit(2)
    raise ImportError(_REASON)

import importlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

_PACKAGES = {"runtime", "export", "calibration", "plugins_trt"}


def _is_ours() -> bool:
    """Whether this process runs one of our command lines: ``python -m export.onnx``, say, or the script monoedge."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return module.partition(".")[0] in _PACKAGES or Path(words[1] if words[1:] else "").stem == "monoedge"


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells in one line of an interrupt that nobody catches, by whose signal Python then dies, as it always does; and
    of a package that is missing before ``main`` could begin."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)  # noqa: T201 - a command line speaks
        return
    if issubclass(kind, ModuleNotFoundError):
        from runtime.packages import BASE, install_command

        name = (getattr(error, "name", None) or "").partition(".")[0]
        if name in BASE:
            command = f"{install_command(BASE[name])} (python -m runtime.doctor tells what else is missing)"
            print(f"error: {name} is not installed; this installs it: {command}", file=sys.stderr)  # noqa: T201
            sys.exit(2)
    sys.__excepthook__(kind, error, trace)


if _is_ours():  # Until ``runtime.console.run`` takes over, when ``main`` begins.
    sys.excepthook = _tell

from runtime.errors import BackendError, BundleError, ImageError, MonoedgeError, OptionError, PromptError

if TYPE_CHECKING:
    from runtime.answer import Answer, Stats
    from runtime.model import Model, load
    from runtime.session import Session

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BackendError",
    "BundleError",
    "ImageError",
    "Model",
    "MonoedgeError",
    "OptionError",
    "PromptError",
    "Session",
    "Stats",
    "__version__",
    "load",
]

_PLACES = {
    "Answer": "runtime.answer",
    "Stats": "runtime.answer",
    "Model": "runtime.model",
    "load": "runtime.model",
    "Session": "runtime.session",
}
"""The modules of the names that need packages."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_PLACES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
