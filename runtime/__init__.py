"""Answers about images from a bundle: ``runtime.Session(image, prompt)``.

Needs numpy, pillow, tokenizers and tqdm; a backend's own packages are imported when it is chosen.
"""

# ruff: noqa: E402 - what is imported below takes time, in which a command line may be interrupted

import sys
from pathlib import Path
from types import TracebackType

_PACKAGES = {"runtime", "export", "calibration", "plugins_trt"}


def _is_ours() -> bool:
    """Whether this process runs one of our command lines: ``python -m export.onnx``, say, or the script monoedge."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return module.partition(".")[0] in _PACKAGES or Path(words[1] if words[1:] else "").stem == "monoedge"


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells of an interrupt that nobody catches in one line. Python then dies by its signal, as it always does."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)  # noqa: T201 - a command line speaks
    else:
        sys.__excepthook__(kind, error, trace)


if _is_ours():  # Until ``runtime.console.run`` takes over, when ``main`` begins.
    sys.excepthook = _tell

from runtime.answer import Answer, Stats
from runtime.errors import BackendError, BundleError, ImageError, MonoedgeError, OptionError, PromptError
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
