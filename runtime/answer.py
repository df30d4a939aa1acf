"""One answer, generated while it is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtime.conversation import Prompt
from runtime.errors import NotCopied
from runtime.generation import Sequence
from runtime.options import AnswerOptions
from runtime.sampling import Sampler
from runtime.text.streaming import AnswerText
from runtime.text.tokenizer import Tokenizer


@dataclass
class Stats:
    """Numbers of tokens of an answer, and the time that it took, in seconds.

    Attributes:
        prompt_tokens: tokens of the whole conversation up to the answer.
        visual_tokens: those of them that belong to images.
        reused_tokens: those of them that the cache held already.
        generated_tokens: tokens of the answer, the one that ended it included.
        time_to_first_token: time from the first reading of the answer to its first token, and before that the time to
            read the images and write the prompt; None until then.
        tokens_per_second: rate of the tokens after the first; None with fewer than two.
    """

    prompt_tokens: int
    visual_tokens: int
    reused_tokens: int
    generated_tokens: int = 0
    time_to_first_token: float | None = None
    tokens_per_second: float | None = None


class Answer(NotCopied):
    """An answer in the making. Iterate over it to stream the text, or read ``text`` for the whole.

    Tokens are computed as they are asked for, in the reader's thread. Several threads may read. Whatever interrupts the
    computing, Ctrl-C among it, the next reading goes on where it was.

    Attributes:
        lock: held while a token is computed; who holds it sees the answer stand still.
        stats: tokens and times so far.
        prompt: the tokens that the decoder reads.
        generated_ids: the tokens chosen, the one that ended the answer included.
        finish_reason: None while unfinished; then ``"stop"`` (the model ended it, or a stop string came),
            ``"length"`` (max_new_tokens) or ``"cancelled"``.
    """

    def __init__(
        self,
        sequence: Sequence,
        prompt: Prompt,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        options: AnswerOptions,
        max_new_tokens: int,
        preparation: float,
    ) -> None:
        self.prompt = prompt
        self.lock = threading.RLock()
        self.generated_ids: list[int] = []
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self.stats = Stats(
            prompt_tokens=len(prompt),
            visual_tokens=int(prompt.visual_mask.sum()),
            reused_tokens=sequence.reusable(prompt),
        )
        self._sequence, self._stop_ids = sequence, stop_ids | tokenizer.stop_ids(options.stops)
        self._max_new_tokens, self._preparation = max_new_tokens, preparation
        self._sampler = Sampler(options)
        self._new_text = partial(AnswerText, tokenizer, options.stops)
        self._text, self._pieces = self._new_text(), list[str]()
        self._logits: list[npt.NDArray[np.float32]] | None = [] if options.return_logits else None
        self._cancelled = threading.Event()
        self._asked_by, self._left = threading.get_ident(), False
        self._started = self._first_token_at = 0.0
        # While a step is under way: the number of tokens before it, and the state of the draws.
        self._step: tuple[int, dict[str, Any]] | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces of the answer as they become certain; every iteration starts from the first."""
        index = 0
        self._left = False
        try:
            while self._advance(index):
                yield self._pieces[index]
                index += 1
        except BaseException:  # GeneratorExit among them
            self._left = True
            raise

    @property
    def text(self) -> str:
        """The whole answer, generated to its end first."""
        return "".join(self)

    @property
    def text_so_far(self) -> str:
        """What has been generated, without waiting for more."""
        return "".join(self._pieces)

    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """[generated_tokens, vocab] as the decoder returned them; None without ``return_logits``."""
        if self._logits is None:
            return None
        return np.stack(self._logits) if self._logits else np.empty((0, 0), np.float32)

    def cancel(self) -> None:
        """Ends the answer after the token at hand. May be called from any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Ends the answer here, if it has not ended; its sequence is then free for the next."""
        self.cancel()
        with self.lock:
            while self.finish_reason is None:
                self._next_token()

    def text_if_closed(self) -> str:
        """Returns the text that the answer would have if it ended here."""
        with self.lock:
            if self.finish_reason is not None:
                return self.text_so_far
            text, pieces = self._replayed()
            return "".join([*pieces, text.finish()])

    def settle(self) -> None:
        """Computes the answer of another thread to its end, unless its reader left."""
        while self._asked_by != threading.get_ident() and not self._left and self._advance(len(self._pieces)):
            time.sleep(0)  # Its reader may have the piece before the next is computed.

    def _advance(self, seen: int) -> bool:
        """Generates until there are more than ``seen`` pieces; returns false if the answer ends before."""
        if seen < len(self._pieces):
            return True
        with self.lock:
            while len(self._pieces) <= seen and self.finish_reason is None:
                self._next_token()
            return len(self._pieces) > seen

    def _next_token(self) -> None:
        """Takes one step. ``generated_ids`` is what counts: an interrupted step is made good from it."""
        if self._step is not None:
            self._repair(*self._step)
        self._step = (len(self.generated_ids), self._sampler.state)
        if self.finish_reason is None and self._choose():
            self._read(self.generated_ids[-1])
        self._step = None

    def _choose(self) -> bool:
        """Computes the next token; returns false if the answer was cancelled instead."""
        if self._cancelled.is_set():
            return self._finish("cancelled")
        if not self._started:
            self._started = time.perf_counter() - self._preparation
        if self.generated_ids:
            logits = self._sequence.step(self.generated_ids[-1])
        else:
            prefilled = self._sequence.prefill(self.prompt, self._cancelled.is_set)
            if prefilled is None:
                return self._finish("cancelled")
            logits = prefilled
        token_id = self._sampler.next(logits, self.generated_ids)
        if self._logits is not None:
            self._logits.append(logits)
        self.generated_ids.append(token_id)
        return True

    def _read(self, token_id: int) -> None:
        if token_id not in self._stop_ids:
            self._give(self._text.push(token_id))
        self._account(token_id)

    def _account(self, token_id: int) -> None:
        self._measure()
        if token_id in self._stop_ids or self._text.stopped:
            self._finish("stop")
        elif len(self.generated_ids) == self._max_new_tokens:
            self._finish("length")

    def _measure(self) -> None:
        now, stats = time.perf_counter(), self.stats
        stats.generated_tokens = len(self.generated_ids)
        if stats.time_to_first_token is None:
            stats.time_to_first_token = now - self._started
            self._first_token_at = now
        elif stats.generated_tokens > 1:
            stats.tokens_per_second = (stats.generated_tokens - 1) / max(now - self._first_token_at, 1e-9)

    def _repair(self, tokens: int, draws: dict[str, Any]) -> None:
        if len(self.generated_ids) == tokens:  # The step came to nothing.
            self._sampler.state = draws
        self._sequence.truncate(len(self.prompt) + max(0, len(self.generated_ids) - 1))
        if self._logits is not None:
            del self._logits[len(self.generated_ids) :]
        self._text, self._pieces = self._replayed()
        if len(self.generated_ids) > tokens:
            self._account(self.generated_ids[-1])

    def _replayed(self) -> tuple[AnswerText, list[str]]:
        text = self._new_text()
        pieces = [text.push(token_id) for token_id in self.generated_ids if token_id not in self._stop_ids]
        return text, [piece for piece in pieces if piece]

    def _finish(self, reason: Literal["stop", "length", "cancelled"]) -> Literal[False]:
        self._give(self._text.finish())
        self.finish_reason = reason
        return False

    def _give(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
