"""The options of an answer, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from runtime.errors import OptionError
from runtime.sampling import SamplingOptions

DEFAULT_MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class AnswerOptions(SamplingOptions):
    """How to answer; these and those of ``SamplingOptions`` are the keywords of ``Session`` and ``Session.ask``.

    Attributes:
        max_new_tokens: tokens that the answer may have. None: up to 1024, or what the conversation has room for.
        max_tiles: most tiles that an image is cut into, the thumbnail not counted; None for the checkpoint's own
            limit. Fewer tiles are faster and see less detail.
        stop: strings that end the answer; they are not part of it.
        return_logits: keep the logits of every step in ``Answer.logits``.

    Raises:
        OptionError: a value of another type or out of range.
    """

    max_new_tokens: int | None = None
    max_tiles: int | None = None
    stop: str | Sequence[str] = ()
    return_logits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.max_new_tokens
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise OptionError(f"max_new_tokens must be a whole number of at least 1, or None, got {count!r}")
        # The upper limit is the checkpoint's business, and is checked with the image.
        tiles = self.max_tiles
        if tiles is not None and (isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1):
            raise OptionError(f"max_tiles must be a whole number of at least 1, or None, got {tiles!r}")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(item, str) and item for item in stops):
            raise OptionError(f"stop must be a string or a list of strings, none of them empty, got {self.stop!r}")
        if not isinstance(self.return_logits, bool):
            raise OptionError(f"return_logits must be True or False, got {self.return_logits!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def changed(self, values: dict[str, Any]) -> AnswerOptions:
        """These options with some values replaced.

        Raises:
            OptionError: an unknown name, or a bad value.
        """
        known = [field.name for field in fields(self)]
        for name in values:
            if name not in known:
                raise OptionError(f"option {name!r} is not known, expected one of: {', '.join(known)}")
        return replace(self, **values)
