"""The options of an answer, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from runtime.errors import OptionError

DEFAULT_MAX_NEW_TOKENS = 1024

# What only draws at random read.
_SAMPLING = ("temperature", "top_k", "top_p", "seed")

# A larger whole number is a mistake: of a seed, of a number of tokens.
_MOST = 2**63 - 1

# Beyond these, float32 logits over- or underflow when they are scaled.
_SMALLEST, _LARGEST = 1e-5, 1e5


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens; the names and defaults are those of transformers' GenerationConfig.

    Attributes:
        do_sample: draw at random; False takes the most probable token and reads only ``repetition_penalty``.
        temperature: what the logits are divided by, 1e-5 … 1e5.
        top_k: draw from the k most probable tokens, and those tied with the last; 0 or None for all.
        top_p: draw from the fewest most probable tokens whose probabilities add up to this, 0 … 1, but at least from
            one.
        repetition_penalty: what positive logits of earlier tokens are divided by and negative ones multiplied by,
            1e-5 … 1e5; 1 for none.
        seed: of the draws, 0 or more; None for a fresh one each time.

    Raises:
        OptionError: a value of another type or out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_flag("do_sample", self.do_sample)
        greedy = ": for greedy decoding use do_sample=False"
        _require_number("temperature", self.temperature, _SMALLEST, _LARGEST, greedy)
        _require_number("top_p", self.top_p, 0, 1)
        _require_number("repetition_penalty", self.repetition_penalty, _SMALLEST, _LARGEST)
        require_whole("top_k", self.top_k, 0)
        require_whole("seed", self.seed, 0)


@dataclass(frozen=True)
class AnswerOptions(SamplingOptions):
    """How to answer; these and those of ``SamplingOptions`` are the keywords of ``Session`` and ``Session.ask``.

    Attributes:
        max_new_tokens: tokens that the answer may have. None: up to 1024, or what the conversation has room for.
        max_tiles: most tiles that an image is cut into, the thumbnail not counted; None for the checkpoint's own
            limit. Fewer tiles are faster and show less detail.
        as_stored: read images with the pixels of the official code, not as viewers show them
            (``runtime.images.shown``).
        max_pixels: width × height of an image at most; None for ``runtime.images.load.MAX_PIXELS``.
        stop: strings that end the answer; they are not part of it.
        return_logits: keep the logits of every step in ``Answer.logits``.

    Raises:
        OptionError: a value of another type or out of range.
    """

    max_new_tokens: int | None = None
    max_tiles: int | None = None
    as_stored: bool = False
    max_pixels: int | None = None
    stop: str | Sequence[str] = ()
    return_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("max_new_tokens", self.max_new_tokens, 1)
        # What else the checkpoint asks of it is checked with the image.
        require_whole("max_tiles", self.max_tiles, 1)
        require_whole("max_pixels", self.max_pixels, 1)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(item, str) and item for item in stops):
            raise OptionError(f"stop must be a string or a list of strings, none of them empty, got {self.stop!r}")
        _require_flag("as_stored", self.as_stored)
        _require_flag("return_logits", self.return_logits)

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def changed(self, values: dict[str, Any]) -> AnswerOptions:
        """Returns these options with some values replaced.

        Raises:
            OptionError: an unknown name, a bad value, or one that does nothing with the others.
        """
        known = [field.name for field in fields(self)]
        for name in values:
            if name not in known:
                raise OptionError(f"option {name!r} is not known, expected one of: {', '.join(known)}")
        changed = replace(self, **values)
        for name in _SAMPLING:
            if not changed.do_sample and name in values and values[name] != getattr(AnswerOptions, name):
                raise OptionError(f"{name} does nothing without do_sample=True: add that, or leave {name} out")
        return changed


def require_whole(name: str, value: object, least: int, most: int = _MOST) -> None:
    """Checks that an option is a whole number from ``least`` to ``most``, or None: left out.

    Raises:
        OptionError: it is not.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not (whole and least <= value <= most):  # type: ignore[operator]
        bounds = f"of at least {least}" if most == _MOST else f"from {least} to {most}"
        nothing = "" if name.startswith("--") else ", or None"
        raise OptionError(f"{name} must be a whole number {bounds}{nothing}, got {value!r:.100}")


def _require_flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name} must be True or False, got {value!r}")


def _require_number(name: str, value: float, least: float, most: float, instead_of_zero: str = "") -> None:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (number and least <= value <= most):
        fix = instead_of_zero if number and value == 0 else ""
        raise OptionError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}{fix}")
