"""An answer's text while its tokens come: each piece is given out as soon as no later token can change it."""

from __future__ import annotations

import codecs

from runtime.text.tokenizer import CLEANUP, EACH_BYTE, Tokenizer


class AnswerText:
    """Makes the text of an answer from token ids: stripped, and cut before a stop string.

    Text that may turn out to be white space at the end, or the beginning of a stop string, is held back.

    Args:
        tokenizer: the bundle's.
        stops: strings that end the answer.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._decoder, self._stops = StreamDecoder(tokenizer), stops
        self._held = ""
        self._started = False
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Returns the text that is certain with this token and was not before."""
        return self._take(self._decoder.push(token_id), last=False)

    def finish(self) -> str:
        """Returns the text that was still held back."""
        return "" if self.stopped else self._take(self._decoder.finish(), last=True)

    def _take(self, text: str, last: bool) -> str:
        self._held += text
        if not self._started:
            # The official code strips answers; a stop string is looked for in what is left.
            self._held = self._held.lstrip()
        found = [place for place in map(self._held.find, self._stops) if place >= 0]
        if found:
            self.stopped, last = True, True
            self._held = self._held[: min(found)]
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - keep].rstrip()
        self._held = "" if last else self._held[len(certain) :]
        self._started = self._started or bool(certain)
        return certain


class StreamDecoder:
    """Decodes an answer token by token: its pieces together are ``tokenizer.decode`` of all ids.

    An incomplete character is held back until its bytes are there, and a space at the end until what follows it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(EACH_BYTE)
        self._cleanup = [_StreamingReplace(old, new) for old, new in CLEANUP]

    def push(self, token_id: int) -> str:
        """Returns the text that is certain with this token and was not before; possibly none."""
        text = self._utf8.decode(self._bytes_of(token_id))
        for replace in self._cleanup:
            text = replace.push(text)
        return text

    def finish(self) -> str:
        """Returns the text that was still held back."""
        text = self._utf8.decode(b"", final=True)
        for replace in self._cleanup:
            text = replace.push(text) + replace.finish()
        return text


class _StreamingReplace:
    """``str.replace`` of a text that comes in parts: holds back what may be the beginning of ``old``."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""

    def push(self, text: str) -> str:
        *replaced, rest = (self._held + text).split(self._old)
        self._held = self._old[: _overlap(rest, self._old)]
        return self._new.join([*replaced, rest.removesuffix(self._held)])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, start: str) -> int:
    """Returns the length of the longest end of ``text`` with which ``start`` begins but does not end."""
    return next(size for size in range(min(len(text), len(start) - 1), -1, -1) if text.endswith(start[:size]))
