"""Answers about images from a bundle: ``runtime.Session(image, prompt)``.

Needs numpy, pillow, tokenizers and tqdm; a backend's own packages are imported when it is chosen.
"""

# ruff: noqa: E402 - what follows takes time, in which a command line may be interrupted

from runtime.console.imports import tell_interrupts_briefly

tell_interrupts_briefly()

from runtime.answer import Answer, Stats
from runtime.errors import (
    BackendError,
    BundleError,
    ImageError,
    MonoedgeError,
    OptionError,
    PromptError,
)
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
