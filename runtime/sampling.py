"""The next token from the decoder's logits, by the definitions of transformers' ``generate``.

First comes RepetitionPenaltyLogitsProcessor. Greedy decoding then takes the largest logit. Sampling goes on with
TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, softmax and one draw. The draw is numpy's: a
seed repeats an answer here, but not the one that torch draws with that seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError
from runtime.options import SamplingOptions

TokenIds = Sequence[int] | NDArray[np.integer]
"""Token ids; an array is read without copying it token by token."""


class Sampler:
    """Chooses one token after another; holds the state of the random draws.

    Args:
        options: how to choose.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.default_rng(options.seed)

    @property
    def state(self) -> Any:  # noqa: ANN401 - numpy's own
        """The state of the random draws; setting it takes draws back."""
        return self._random.bit_generator.state

    @state.setter
    def state(self, state: Any) -> None:  # noqa: ANN401
        self._random.bit_generator.state = state

    def next(self, logits: NDArray[np.float32], previous_ids: TokenIds) -> int:
        """Chooses the next token.

        Args:
            logits: float32 [vocab]; not changed.
            previous_ids: the tokens that ``repetition_penalty`` is applied to. The official code generates from
                embeddings, so these are the generated tokens, without the prompt.

        Returns:
            The token's id. Greedy ties go to the lowest id.

        Raises:
            BackendError: the logits are not one row, or their largest is NaN or infinite.
        """
        ids, probabilities = self._distribution(logits, previous_ids)
        if len(ids) == 1:
            return int(ids[0])
        cumulative = np.cumsum(probabilities, dtype=np.float64)
        # In (0, 1], not [0, 1): with side="left" a token of probability 0 can then never be hit.
        point = 1.0 - self._random.random()
        return int(ids[np.searchsorted(cumulative, point * cumulative[-1], side="left")])

    def probabilities(self, logits: NDArray[np.float32], previous_ids: TokenIds) -> NDArray[np.float32]:
        """Returns the distribution that ``next`` draws from, float32 [vocab]; takes and raises the same."""
        ids, probabilities = self._distribution(logits, previous_ids)
        full = np.zeros(len(logits), np.float32)
        full[ids] = probabilities
        return full

    def _distribution(
        self, logits: NDArray[np.float32], previous_ids: TokenIds
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """Returns the tokens that are left to choose from, and the probability of each."""
        options = self.options
        scores = np.asarray(logits, dtype=np.float32)
        if scores.ndim != 1 or not scores.size:
            raise BackendError(f"the decoder returned logits of shape {list(scores.shape)}, expected [vocab]")
        best = scores.argmax()  # of NaN, if there is any
        if not np.isfinite(scores[best]):
            raise BackendError(
                f"the decoder returned NaN or infinite logits ({scores[best]} at token {best}): "
                "its number format is too narrow for this model; export it in bf16 or fp32"
            )
        if options.repetition_penalty != 1:
            scores = _penalized(scores, previous_ids, np.float32(options.repetition_penalty))
            best = scores.argmax()
        if not options.do_sample:
            return np.array([best]), np.ones(1, np.float32)

        ids = np.arange(scores.size)
        scores = scores / np.float32(options.temperature)
        if options.top_k:
            ids = _largest(scores, int(options.top_k))
            scores = scores[ids]
        if options.top_p < 1:
            kept = _nucleus(scores, options.top_p)
            ids, scores = ids[kept], scores[kept]
        return ids, _softmax(scores)


def _penalized(scores: NDArray[np.float32], previous_ids: TokenIds, penalty: np.float32) -> NDArray[np.float32]:
    ids = np.asarray(previous_ids, dtype=np.intp)
    ids = ids[ids < scores.size]  # a vocabulary may have more ids than the decoder has logits
    scores = scores.copy()
    seen = scores[ids]
    scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)  # once each, however often it occurs
    return scores


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    weights = np.exp(scores - scores.max())
    probabilities: NDArray[np.float32] = weights / np.float32(weights.sum(dtype=np.float64))
    return probabilities


def _largest(scores: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Returns the indices, ascending, of the ``count`` largest scores and of all that equal the last of them."""
    if count >= scores.size:
        return np.arange(scores.size)
    return np.flatnonzero(scores >= np.partition(scores, -count)[-count])


def _nucleus(scores: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """Returns the indices that TopPLogitsWarper keeps.

    Sorted ascending, these are the scores whose cumulative probability exceeds 1 - top_p, and always the last. Equal
    scores are sorted by index; torch leaves their order open.
    """
    probabilities = _softmax(scores)
    removable = np.float32(1 - top_p)  # torch compares in float32, and adds up in float64
    # Sorting a whole vocabulary takes 10 ms. The cut is nearly always among the largest few; all others are removed
    # whatever their order.
    count = 256
    while True:
        candidates = _largest(scores, count)
        chosen = probabilities[candidates]
        rest = max(0.0, float(probabilities.sum(dtype=np.float64) - chosen.sum(dtype=np.float64)))
        if rest <= removable or len(candidates) == scores.size:
            break
        count *= 8
    order = np.argsort(scores[candidates], kind="stable")
    kept = (rest + np.cumsum(chosen[order], dtype=np.float64)).astype(np.float32) > removable
    kept[-1] = True
    nucleus: NDArray[np.intp] = candidates[order[kept]]
    return nucleus
