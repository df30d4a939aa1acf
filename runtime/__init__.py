"""Answers about images from a bundle: ``runtime.Session(image, prompt)``.

Needs numpy, pillow and tokenizers; a backend's own packages are imported when it is chosen.
"""

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
    "load",
]
