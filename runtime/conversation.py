"""A conversation as the tokens that the decoder reads.

Every turn renders the whole conversation anew, as the official code does, so that what a cache holds can never change
an answer: it is only a prefix that need not be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Pixels
from runtime.errors import PromptError
from runtime.images.frames import DevicePixels
from runtime.images.preprocess import pixel_digest
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer

_PLACE_BITS = 32
"""A visual token's key holds its place in the image in that many bits, and the image's number above them."""


@dataclass(frozen=True)
class ConversationImage:
    """An image of the conversation, ready for the vision network.

    ``number`` is the same for the same pixels, so that cached tokens of an image match that image only; each picture
    from a GPU's memory has a number of its own.
    """

    pixel_values: Pixels
    number: int


@dataclass
class Turn:
    """A question with its images' tokens in place, and the answer as far as there is one."""

    question: str
    images: tuple[ConversationImage, ...]
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
    images: tuple[ConversationImage, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Conversation:
    """Turns to tokens, for one session.

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
        self._tokens_per_tile, self._system = tokens_per_tile, system
        self._numbers: dict[str, int] = {}

    def turn(self, question: str, images: Sequence[Pixels]) -> Turn:
        """A turn without an answer.

        Args:
            question: as the user asks it.
            images: pixel_values of each new image, [tiles, 3, size, size].

        Raises:
            PromptError: the question does not fit its images.
        """
        placed = self._template.place_images(question, list(map(len, images)), self._tokens_per_tile)
        return Turn(placed, tuple(map(self._numbered, images)))

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """The tokens of a conversation; all turns but the last have answers.

        Raises:
            PromptError: the text has other visual tokens than the images.
        """
        text = self._template.render([(turn.question, turn.answer) for turn in turns], self._system)
        ids = np.asarray(self._tokenizer.encode(text), np.int64)
        visual_mask = ids == self._tokenizer.id_of(self._template.image_context)
        images = tuple(image for turn in turns for image in turn.images)
        image_keys = [_keys(image, self._tokens_per_tile) for image in images]
        expected = sum(map(len, image_keys))
        if visual_mask.sum() != expected:
            raise PromptError(f"the prompt has {visual_mask.sum()} visual tokens, its images have {expected}")
        keys = ids.copy()
        if image_keys:
            keys[visual_mask] = np.concatenate(image_keys)
        return Prompt(ids, visual_mask, keys, images)

    def _numbered(self, pixel_values: Pixels) -> ConversationImage:
        name = pixel_values.name if isinstance(pixel_values, DevicePixels) else pixel_digest(pixel_values)
        number = self._numbers.setdefault(name, len(self._numbers))
        return ConversationImage(pixel_values, number)


def _keys(image: ConversationImage, tokens_per_tile: int) -> npt.NDArray[np.int64]:
    """Negative, so that no visual token is ever taken for a text token."""
    places = np.arange(len(image.pixel_values) * tokens_per_tile, dtype=np.int64)
    return -1 - ((np.int64(image.number) << _PLACE_BITS) | places)


def common_prefix(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """How many leading elements are equal."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
