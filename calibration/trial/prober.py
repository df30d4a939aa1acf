"""Asks a model examples: their tokens, the model's own answers, and its logits along given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from calibration import CalibrationError
from calibration.data import Example
from runtime.console.console import Console
from runtime.conversation import Conversation, Prompt, common_prefix
from runtime.errors import ImageError, PromptError
from runtime.generation import Sequence as TokenSequence
from runtime.model import Model

Logits = npt.NDArray[np.float32]


class Prober:
    """Asks a model examples, with the same tokens as sessions.

    Args:
        model: a loaded bundle.
        max_tiles: the most tiles of a picture; None for the checkpoint's limit.
        max_new_tokens: the most tokens of an answer.
    """

    def __init__(self, model: Model, max_tiles: int | None, max_new_tokens: int) -> None:
        self.model, self.max_tiles, self.max_new_tokens = model, max_tiles, max_new_tokens

    def prompt(self, example: Example) -> Prompt:
        """Returns the tokens of a question.

        Raises:
            CalibrationError: a picture or the question cannot be read, or the bundle is too short for the answer.
        """
        return self._prompts(example, None)[0]

    def prompt_and_answer(self, example: Example) -> tuple[Prompt, list[int] | None]:
        """Returns the tokens of a question and of its given answer, its end included; raises as ``prompt`` does."""
        if example.answer is None:
            return self.prompt(example), None
        prompt, whole = self._prompts(example, None, example.answer)
        # The answer's first letters may join the prompt's last token. The prompt then is shorter than it was alone.
        length = min(common_prefix(prompt.keys, whole.keys), len(whole) - 1)
        ids: list[int] = whole.ids[length:].tolist()
        stops = [place for place, token in enumerate(ids) if token in self.model.stop_ids]
        ids = ids[: min([stop + 1 for stop in stops] + [self.max_new_tokens])]
        return Prompt(whole.ids[:length], whole.visual_mask[:length], whole.keys[:length], whole.images), ids

    def answer(self, prompt: Prompt) -> Iterator[tuple[int, Logits]]:
        """Yields the model's own greedy answer, token by token, each with the logits that it was chosen from."""
        sequence, logits = self._prefilled(prompt)
        for count in range(1, self.max_new_tokens + 1):
            token = int(logits.argmax())
            yield token, logits
            if token in self.model.stop_ids or count == self.max_new_tokens:
                return
            logits = sequence.step(token)

    def along(self, prompt: Prompt, ids: Sequence[int]) -> Iterator[Logits]:
        """Yields the logits before each token of a given answer, as many as it has tokens."""
        sequence, logits = self._prefilled(prompt)
        yield logits
        for token in ids[:-1]:
            yield sequence.step(token)

    def _prefilled(self, prompt: Prompt) -> tuple[TokenSequence, Logits]:
        sequence = TokenSequence(self.model.backend, self.model.embed)
        logits = sequence.prefill(prompt, lambda: False)
        assert logits is not None  # noqa: S101 - only when cancelled
        return sequence, logits

    def _prompts(self, example: Example, *answers: str | None) -> list[Prompt]:
        """Returns the tokens of a question with each of the answers; None stands for no answer yet."""
        model = self.model
        conversation = Conversation(model.template, model.tokenizer, model.image_processor.tokens_per_tile)
        try:
            pixels = [model.pixels(image, self.max_tiles, as_stored=example.as_stored) for image in example.images]
            turn = conversation.turn(example.prompt, pixels)
            prompts = [conversation.prompt([replace(turn, answer=answer)]) for answer in answers]
        except (ImageError, PromptError) as error:
            raise CalibrationError(f"{example.place}: {error}") from None
        for prompt in prompts:
            if len(prompt) + self.max_new_tokens > model.max_length:
                raise CalibrationError(
                    f"{example.place}: {len(prompt)} tokens, and {self.max_new_tokens} for the answer, are more than "
                    f"the {model.max_length} that the bundle allows: use --max-tiles or a smaller --max-new-tokens"
                )
        return prompts


def check_examples(prober: Prober, examples: Sequence[Example], console: Console) -> None:
    """Reads every picture and question once, so that a bad one is reported, with its line, before any work."""
    for example in console.track(examples, "reading", len(examples)):
        prober.prompt_and_answer(example)
