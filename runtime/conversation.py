"""A conversation as the tokens that the decoder reads.

Every turn renders the whole conversation anew, as the official code does. What a cache holds is only a prefix that need
not be computed again, and can never change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import PromptError
from runtime.images.pixels import Pixels
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

_PLACE_BITS = 32
"""A visual token's key holds its place in the image in that many bits, and above them a number that images of one name
share."""


@dataclass(frozen=True)
class Turn:
    """A question with its images' tokens in place, and its answer; None for the last, which is still to come."""

    question: str
    images: tuple[Pixels, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Prompt:
    """The tokens of a whole conversation, up to where the next answer begins.

    Attributes:
        ids: int64 [tokens].
        visual_mask: bool [tokens].
        keys: int64 [tokens]; equal keys at equal places mean equal cache contents.
        images: the images in the order of their tokens.
    """

    ids: npt.NDArray[np.int64]
    visual_mask: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.int64]
    images: tuple[Pixels, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Conversation:
    """Makes tokens of turns, for one session.

    Args:
        template: how this checkpoint renders conversations.
        tokenizer: the bundle's.
        tokens_per_tile: visual tokens of a tile.
        system: a system message instead of the template's own.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, tokens_per_tile: int, system: str | None = None
    ) -> None:
        self._template, self._tokenizer = template, tokenizer
        # Repeated for each visual token: as plain text it would become tokens without end.
        for token in (template.image_start, template.image_end, template.image_context):
            tokenizer.id_of(token)
        self._tokens_per_tile, self._system = tokens_per_tile, system
        self._numbers: dict[str, int] = {}

    def turn(self, question: str, images: Sequence[Pixels]) -> Turn:
        """Returns a turn without an answer.

        Args:
            question: as the user asks it.
            images: the tiles of each new image.

        Raises:
            PromptError: the question does not fit its images.
        """
        placed = self._template.place_images(question, list(map(len, images)), self._tokens_per_tile)
        return Turn(placed, tuple(images))

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """Returns the tokens of a conversation; all turns but the last have answers.

        Raises:
            PromptError: the text has other visual tokens than the images.
        """
        text = self._template.parts([(turn.question, turn.answer) for turn in turns], self._system)
        ids = np.asarray(self._tokenizer.encode(text), np.int64)
        visual_mask = ids == self._tokenizer.id_of(self._template.image_context)
        images = tuple(image for turn in turns for image in turn.images)
        image_keys = list(map(self._keys, images))
        expected = sum(map(len, image_keys))
        if visual_mask.sum() != expected:
            raise PromptError(f"the prompt has {visual_mask.sum()} visual tokens, its images have {expected}")
        keys = ids.copy()
        if image_keys:
            keys[visual_mask] = np.concatenate(image_keys)
        return Prompt(ids, visual_mask, keys, images)

    def _keys(self, image: Pixels) -> npt.NDArray[np.int64]:
        """Keys of an image's tokens; negative, so that no visual token is ever taken for a text token."""
        number = self._numbers.setdefault(image.name, len(self._numbers))
        places = np.arange(len(image) * self._tokens_per_tile, dtype=np.int64)
        return -1 - ((np.int64(number) << _PLACE_BITS) | places)


def common_prefix(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """Returns how many leading elements are equal."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
