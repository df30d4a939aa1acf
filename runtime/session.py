"""A conversation about images, as an app holds one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.answer import Answer, Stats
from runtime.conversation import Conversation, Turn
from runtime.errors import NotCopied, OptionError, PromptError
from runtime.generation import Sequence
from runtime.images.load import OpenedImage
from runtime.loaded import Images, LoadedBundle, Picture
from runtime.options import DEFAULT_MAX_NEW_TOKENS, AnswerOptions
from runtime.text.tokenizer import Plain


class Session(NotCopied):
    """A conversation. Iterate over it to stream the current answer; ``ask`` goes on with the same cache.

    Nothing is computed until the answer is read. Several threads may use one session: their questions are answered one
    after the other.

    Args:
        image: a path, the bytes of an image file, a PIL image, a uint8 array [height, width, 3] in RGB order, another
            form that ``runtime.images.load.load_image`` takes, a list of these, or None. Where the backend computes on
            a GPU, also an array in its memory (``runtime.images.frames``); that is read when the question is asked,
            and may be written again after.
        prompt: the first question; ``<image>`` in it stands for an image, in order. Without such placeholders
            the images stand before it. None starts the conversation with the first ``ask``.
        bundle: folder of the bundle; by default the environment variable ``MONOEDGE_BUNDLE`` names it.
        model: a model loaded by ``runtime.load``, instead of ``bundle``.
        system: a system message instead of the bundle's own.
        options: see ``AnswerOptions``: max_new_tokens, max_tiles, as_stored, max_pixels, do_sample, temperature, top_k,
            top_p, repetition_penalty, seed, stop, return_logits. They hold for the whole session.

    Raises:
        BundleError, BackendError: the bundle cannot be used.
        ImageError: an image cannot be read.
        PromptError: the prompt does not fit its images, or the conversation does not fit the cache.
        OptionError: a bad option.
    """

    def __init__(
        self,
        image: Images = None,
        prompt: str | None = None,
        *,
        bundle: str | Path | None = None,
        model: LoadedBundle | None = None,
        system: str | None = None,
        **options: Any,  # noqa: ANN401 - checked by AnswerOptions
    ) -> None:
        self._options = AnswerOptions().changed(options)
        if model is None:
            model = LoadedBundle.load(bundle)
        elif bundle is not None:
            raise OptionError("expected either bundle or model, got both: a model has its bundle already")
        elif not isinstance(model, LoadedBundle):
            kind = type(model).__name__
            raise OptionError(f"expected model as runtime.load returns it, got {kind}: pass a folder as bundle")
        self._model = model
        self._conversation = Conversation(
            model.template, model.tokenizer, model.image_processor.tokens_per_tile, system
        )
        self._sequence = Sequence(model.backend, model.embed)
        self._lock = threading.RLock()
        # The turns, and the answer to the last: replaced together, so that no interrupt leaves one without the other.
        self._state: tuple[tuple[Turn, ...], Answer | None] = ((), None)
        self._waiting: list[Picture] = []
        if prompt is not None:
            self.ask(prompt, image)
        else:
            # Decoded now, so that a bad image is reported at once.
            self._waiting = self._read(image, self._options)
            for picture in self._waiting:
                _ = picture.rgb if isinstance(picture, OpenedImage) else None

    def ask(self, prompt: str, image: Images = None, **options: Any) -> Answer:  # noqa: ANN401 - checked right here
        """Asks the next question.

        An answer that has not been read to its end is ended first; what was generated of it stays in the conversation.
        One that another thread asked for is first computed to its end, unless its reader left or ``cancel`` is called.

        Args:
            prompt: the next question.
            image: new images; those of earlier turns are remembered.
            options: options for this answer only.

        Returns:
            The new answer, which is also what iterating over the session reads.

        Raises:
            MonoedgeError: as the constructor does. The conversation then stays as it was.
        """
        started = time.perf_counter()
        chosen = self._options.changed(options)
        pictures = self._read(image, chosen)
        with self._lock:
            turns, previous = self._state
            pictures = pictures if turns else [*self._waiting, *pictures]
            turn = self._conversation.turn(prompt, self._model.cut(pictures, chosen.max_tiles))
            if previous is not None:
                previous.settle()
            with previous.lock if previous is not None else nullcontext():
                if previous is not None:
                    # What a model wrote is never markup when it is read again.
                    turns = (*turns[:-1], replace(turns[-1], answer=Plain(previous.text_if_closed())))
                turns = (*turns, turn)
                tokens = self._conversation.prompt(turns)
                answer = Answer(
                    self._sequence,
                    tokens,
                    self._model.tokenizer,
                    self._model.stop_ids,
                    chosen,
                    self._room(len(tokens), chosen.max_new_tokens),
                    preparation=time.perf_counter() - started,
                )
                if previous is not None:
                    previous.close()
                self._state = (turns, answer)
            self._waiting = []
            return answer

    def _read(self, image: Images, options: AnswerOptions) -> list[Picture]:
        return self._model.read(image, as_stored=options.as_stored, max_pixels=options.max_pixels)

    def _room(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        limit = self._model.max_length
        wanted = max_new_tokens if max_new_tokens is not None else 1
        if prompt_tokens + wanted > limit:
            raise PromptError(
                f"the conversation has {prompt_tokens} tokens and the answer may have {wanted}, together "
                f"{prompt_tokens + wanted}, but {self._model.backend.length_limit}: use fewer tiles (max_tiles), a "
                "smaller max_new_tokens, or a new session"
            )
        return max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, limit - prompt_tokens)

    @property
    def answer(self) -> Answer:
        """The current answer.

        Raises:
            PromptError: nothing has been asked yet.
        """
        answer = self._state[1]
        if answer is None:
            raise PromptError("nothing has been asked yet: give Session a prompt, or call ask(prompt)")
        return answer

    @property
    def history(self) -> list[tuple[str, str]]:
        """Questions, with their image tokens, and answers; the current answer as far as it was generated."""
        turns, answer = self._state
        last = "" if answer is None else answer.text_so_far
        return [(turn.question, last if turn.answer is None else turn.answer) for turn in turns]

    def __iter__(self) -> Iterator[str]:
        """Streams the current answer."""
        return iter(self.answer)

    @property
    def text(self) -> str:
        """The whole current answer, generated to its end first."""
        return self.answer.text

    @property
    def stats(self) -> Stats:
        """Tokens and times of the current answer."""
        return self.answer.stats

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens that the decoder reads for the current answer."""
        ids: list[int] = self.answer.prompt.ids.tolist()
        return ids

    @property
    def visual_mask(self) -> npt.NDArray[np.bool_]:
        """Which of ``prompt_ids`` are visual tokens."""
        return self.answer.prompt.visual_mask

    @property
    def generated_ids(self) -> list[int]:
        """The tokens of the current answer so far, the one that ended it included."""
        return list(self.answer.generated_ids)

    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """[generated tokens, vocab] of the current answer; None without ``return_logits=True``."""
        return self.answer.logits

    def cancel(self) -> None:
        """Ends the current answer after the token at hand. May be called from any thread."""
        if self._state[1] is not None:
            self._state[1].cancel()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self._state[1] is not None:
            self._state[1].close()
