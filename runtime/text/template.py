"""The chat template: a conversation as the text that the tokenizer reads.

A bundle carries its checkpoint's template as data; no template is written here. The form is that of the official code's
conversations: nothing stands between a separator and the next prefix, and ``<s>`` is left to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from runtime.errors import BundleError, PromptError
from runtime.records import read_json, read_record
from runtime.text.tokenizer import Plain

PLACEHOLDER = "<image>"
"""What a user writes in a prompt where an image belongs."""

NUMBER = "{number}"
"""Stands for the image's number, counted from 1, in ``ChatTemplate.image_label``."""


@dataclass(frozen=True)
class ChatTemplate:
    """How one checkpoint takes its conversations.

    Attributes:
        name: the template's name in the checkpoint's config.
        system_prefix: opens the system message.
        system_message: the system message unless another is given; may be empty.
        user_prefix: opens a question.
        assistant_prefix: opens an answer.
        separator: closes each message.
        stop_tokens: the tokens that end an answer.
        image_start: the token before an image's tokens.
        image_end: the token after them.
        image_context: the token that stands for one visual token.
        image_label: goes before each of several images without placeholders; ``{number}`` stands for its number.

    Raises:
        BundleError: a value of the wrong type, or empty where it must not be.
    """

    name: str
    system_prefix: str
    system_message: str
    user_prefix: str
    assistant_prefix: str
    separator: str
    stop_tokens: tuple[str, ...]
    image_start: str
    image_end: str
    image_context: str
    image_label: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "stop_tokens":
                expected = "a list of one or more tokens"
                tokens = value if isinstance(value, tuple) else ()
                holds = bool(tokens) and all(isinstance(token, str) and token for token in tokens)
            else:
                may_be_empty = field.name == "system_message"
                expected = "a string" if may_be_empty else "a string that is not empty"
                holds = isinstance(value, str) and (bool(value) or may_be_empty)
            if not holds:
                raise BundleError(
                    f"template: {field.name} must be {expected}, got {value!r:.200}: export the bundle again"
                )

    @classmethod
    def from_json(cls, data: object) -> ChatTemplate:
        """Reads a template from an object of JSON types.

        Raises:
            BundleError: not an object with exactly these keys, or a value of the wrong type.
        """
        return read_record(cls, data, "chat template")

    @classmethod
    def from_file(cls, path: Path) -> ChatTemplate:
        """Reads a chat_template.json.

        Raises:
            BundleError: no such file, or not a template.
        """
        return cls.from_json(read_json(path, remedy=": export the bundle again"))

    def render(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """Writes a conversation as one text, as the official code does; takes and raises what ``parts`` does."""
        return "".join(self.parts(turns, system))

    def parts(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> list[str]:
        """Writes a conversation as parts of a text; an answer that is ``Plain`` stays so.

        Args:
            turns: (question, answer) pairs, the questions as ``place_images`` returns them. The last answer may be
                None: the text then ends where the answer begins. An empty answer is closed like any other.
            system: a system message instead of the template's own.

        Raises:
            PromptError: the system message is not text, it or an answer contains the image token, or a turn before the
                last has no answer.
        """
        message = self.system_message if system is None else system
        _require_text(message, "the system message")
        self._refuse_image_tokens(message, "the system message")
        parts = [self.system_prefix, message, self.separator]
        for number, (question, answer) in enumerate(turns, start=1):
            parts += [self.user_prefix, question, self.separator, self.assistant_prefix]
            if answer is not None:
                self._refuse_image_tokens(answer, f"answer {number}")
                parts += [answer, self.separator]
            elif number < len(turns):
                raise PromptError(
                    f"expected an answer in every turn but the last, turn {number} of {len(turns)} has none: finish or "
                    "drop it before the next question"
                )
        return parts

    def place_images(self, question: str, tiles_per_image: Sequence[int], tokens_per_tile: int) -> str:
        """Puts each image's tokens where they belong in a question.

        ``<image>`` placeholders are replaced in order. Without any, one image stands in a line before the question, and
        several stand there behind their labels.

        Args:
            question: what the user asks.
            tiles_per_image: the number of tiles of each image of this turn, thumbnail included.
            tokens_per_tile: visual tokens of a tile.

        Raises:
            PromptError: the question is not text or is blank; its placeholders are not as many as the images; or it
                contains the image token itself.
        """
        _require_text(question, "the prompt")
        # With an image too: "<image>" shows it without a question, and a blank prompt is mostly a mistake.
        if not question.strip():
            raise PromptError(f"expected a question, got the blank prompt {question!r}: write one")
        self._refuse_image_tokens(question, "the prompt")

        images = [
            self.image_start + self.image_context * (tokens_per_tile * tiles) + self.image_end
            for tiles in tiles_per_image
        ]
        texts = question.split(PLACEHOLDER)
        if len(texts) - 1 == len(images):
            return texts[0] + "".join(image + text for image, text in zip(images, texts[1:], strict=True))
        if len(texts) > 1:
            raise PromptError(
                f"expected one {PLACEHOLDER} placeholder for each of this turn's images or none at all, got "
                f"{len(texts) - 1} in the prompt and {len(images)} new images: add or remove some"
            )
        if len(images) > 1:
            labels = [self.image_label.replace(NUMBER, str(number + 1)) for number in range(len(images))]
            images = [label + image for label, image in zip(labels, images, strict=True)]
        return "".join(images) + "\n" + question

    def _refuse_image_tokens(self, text: str, what: str) -> None:
        if self.image_context in text and not isinstance(text, Plain):
            raise PromptError(f"{what} contains {self.image_context}, which stands for a visual token: take it out")


def _require_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise PromptError(f"expected {what} as a str, got {type(text).__name__}: pass it as text")
