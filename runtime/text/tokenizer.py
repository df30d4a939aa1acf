"""Text to token ids and back, as the official InternLM2Tokenizer does it.

The ``tokenizers`` package encodes, by the bundle's tokenizer.json. Decoding is done here, since no decoder of that
package does what the official tokenizer does: it decodes with sentencepiece, which replaces every invalid byte by a
U+FFFD, and then removes some spaces before punctuation and English contractions.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import tokenizers

from runtime.errors import BundleError, OptionError, PromptError
from runtime.records import read_text

CONTROL_TOKENS = _, BOS, _ = ("<unk>", "<s>", "</s>")
"""Ids 0, 1 and 2."""

CHAT_TOKENS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
"""The last six pieces of the SentencePiece model, in this order."""

IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""The tokens added behind the SentencePiece model, in this order; with them the vocabulary ends."""

SPACE = "▁"
"""How a SentencePiece model writes a space."""

CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""The replacements that the official tokenizer makes in every decoded text, one after the other."""

EACH_BYTE = "monoedge.replace-each-byte"
"""How invalid UTF-8 is decoded: a U+FFFD for each byte."""


def _replace_one_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd", error.start + 1


# Python's own "replace" takes a whole truncated sequence as one error; sentencepiece counts its bytes.
codecs.register_error(EACH_BYTE, _replace_one_byte)


def byte_token(byte: int) -> str:
    """Returns the piece that stands for one byte of a character that has no piece."""
    return f"<0x{byte:02X}>"


class Plain(str):
    """Text in which the spelling of a special token is letters like any other."""


class Tokenizer:
    """The tokenizer of a bundle.

    Args:
        tokenizer: the contents of tokenizer.json.

    Raises:
        BundleError: its vocabulary is not laid out like Mono-InternVL's.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        last = CHAT_TOKENS + IMAGE_TOKENS
        expected = dict(zip(last, range(self.vocab_size - len(last), self.vocab_size), strict=True))
        expected |= {token: index for index, token in enumerate(CONTROL_TOKENS)}
        for token, index in expected.items():
            if vocabulary.get(token) != index:
                got = vocabulary.get(token, "none")
                what = f"expected {token} to have id {index} of {self.vocab_size}, got {got}"
                raise BundleError(f"tokenizer: {what}: export the bundle again")
        bytes_of = {byte_token(byte): bytes([byte]) for byte in range(256)}
        if sorted(vocabulary.values()) != list(range(self.vocab_size)) or not bytes_of.keys() <= vocabulary.keys():
            what = "ids without gaps or repetitions and a piece for each of the 256 bytes"
            raise BundleError(f"tokenizer: expected {what}: export the bundle again")
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # as letters: ``encode`` finds special tokens itself
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(expected, key=len, reverse=True)))})")
        self._ids = vocabulary
        for token, index in expected.items():
            if self.encode(token, add_bos=False) != [index]:
                raise BundleError(f"tokenizer: expected {token} to be one token in text: export the bundle again")
        self._special = {index: token for token, index in expected.items()}
        self._first_image_token = expected[IMAGE_TOKENS[0]]
        # What each token adds to the text; special tokens add nothing. The text of a piece never begins in the middle
        # of a character, so concatenation keeps sentencepiece's rule that the bytes of a character stand side by side.
        self._bytes = [b""] * self.vocab_size
        for piece, index in vocabulary.items():
            if index not in self._special:
                self._bytes[index] = bytes_of.get(piece, piece.replace(SPACE, " ").encode())

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer:
        """Reads a tokenizer.json.

        Raises:
            BundleError: no such file, not a tokenizer, or not one of Mono-InternVL.
        """
        text = read_text(Path(path), remedy=": export the bundle again")
        with _panics(f"{path}: cannot be read as a tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_str(text)
            # A prompt is never cut, nor filled up.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            # It would keep 45 MB of encoded texts; this many are some conversations. Not all versions can.
            getattr(tokenizer.model, "_resize_cache", lambda entries: None)(256)
        return cls(tokenizer)

    def encode(self, text: str | Sequence[str], add_bos: bool = True) -> list[int]:
        """Returns the ids of a text, special tokens in it included; with ``add_bos``, ``<s>`` comes first.

        Args:
            text: one text, or parts of one; in ``Plain`` parts nothing is special.
            add_bos: whether ``<s>`` comes first.

        Raises:
            PromptError: the text has a lone surrogate: half of a character, which has no UTF-8.
        """
        parts = [text] if isinstance(text, str) else text
        try:
            "".join(parts).encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"expected valid Unicode text, got a lone surrogate at position {error.start}: take it out"
            ) from None
        ids, run = [self._ids[BOS]] if add_bos else [], ""
        with _panics("the tokenizer failed on this text"):
            for part in parts:
                # The normalizer writes chat tokens under their usual names, and spaces as SPACE.
                normal = self._tokenizer.normalizer.normalize_str(part)
                first, *rest = [normal] if isinstance(part, Plain) else self._split.split(normal)
                run += first
                for token, after in zip(rest[::2], rest[1::2], strict=True):
                    ids += [*self._letters(run), self._ids[token]]
                    run = after
            return ids + self._letters(run)

    def stop_ids(self, stops: Iterable[str]) -> frozenset[int]:
        """Returns the ids of those stop strings that are special tokens, which add nothing to the text of an answer.

        Raises:
            OptionError: a stop string has a special token among other text, which never comes.
        """
        for stop in stops:
            _, *found = self._split.split(stop)
            if found and stop != found[0]:
                raise OptionError(f"stop {stop!r} never comes, since {found[0]} adds no text: give {found[0]} alone")
        return frozenset(self._ids[stop] for stop in stops if self._ids.get(stop) in self._special)

    def _letters(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids. Special tokens that are kept get the official tokenizer's spaces around them."""
        if skip_special_tokens:
            return _clean(self._text(ids))
        parts = []
        for is_image_token, run in itertools.groupby(ids, lambda index: index >= self._first_image_token):
            if is_image_token:
                parts += [self._special[self._checked(index)] for index in run]
            else:
                parts.append(self._text_with_special(run))
        return " ".join(parts)

    def id_of(self, token: str) -> int:
        """Returns the id of a special token.

        Raises:
            BundleError: the tokenizer has no such special token.
        """
        index = self._ids.get(token)
        if index is None or index not in self._special:
            raise BundleError(f"tokenizer: expected one of {', '.join(self._special.values())}, got {token:.200}")
        return index

    def bytes_of(self, token_id: int) -> bytes:
        """Returns what a token adds to the text in UTF-8: characters, one byte of one, or nothing if it is special."""
        return self._bytes[self._checked(token_id)]

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"expected a token id of at least 0 and below {self.vocab_size}, got {token_id}")
        return token_id

    def _text(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", EACH_BYTE)

    def _text_with_special(self, ids: Iterable[int]) -> str:
        """Decodes ids below the image tokens: the official code puts a space before what precedes a special token."""
        text = ""
        run: list[int] = []
        for index in ids:
            if index in self._special:
                space = "" if text and not run else " "
                text += space + self._text(run) + self._special[index]
                run = []
            else:
                run.append(index)
        return _clean(text + self._text(run))


@contextmanager
def _panics(what: str) -> Iterator[None]:
    """Turns what the package raises into one line. Its panics are no ``Exception``, and their type has no name."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise BundleError(f"{what} ({' '.join(str(error).split())}): export the bundle again") from None


def _clean(text: str) -> str:
    for old, new in CLEANUP:
        text = text.replace(old, new)
    return text
