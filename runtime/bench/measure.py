"""Measures one model in one process."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, Backend
from runtime.bench.machine import BACKENDS, MemoryWatch, versions
from runtime.bench.record import Record, Workload
from runtime.conversation import Prompt
from runtime.errors import OptionError, PromptError
from runtime.generation import Embed, Sequence
from runtime.images.pixels import HostPixels
from runtime.images.preprocess import ImageProcessor
from runtime.options import SamplingOptions
from runtime.sampling import Sampler


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer.

    Attributes:
        backend: what computes.
        embed: token ids [n] → what the backend takes for them, [n, …].
        vocab_size: ids that the prompt is drawn from.
        image_id: the id that stands for a visual token.
        image_processor: how pictures are cut; None for a model without pictures.
        facts: what it is, for people: ``name``, ``precision``, ``computes``.
        weight_bytes: says how many bytes of weights one decoded text token reads; called after all measurements.
    """

    backend: Backend
    embed: Embed
    vocab_size: int
    image_id: int
    image_processor: ImageProcessor | None
    facts: dict[str, str]
    weight_bytes: Callable[[], int]


def measure(what: Workload, load: Callable[[], Loaded]) -> Record:
    """Loads a model, asks it the workload's questions, and returns what that took.

    Raises:
        MonoedgeError: the model cannot be loaded, or the workload does not fit it.
    """
    memory = MemoryWatch()
    started = time.perf_counter()
    loaded = load()
    load_seconds = time.perf_counter() - started
    memory.sample()
    questions = _Questions(what, loaded)
    answers = [_answer(questions, what.new_tokens, memory) for _ in range(what.warmup + what.repeats)]
    memory.sample_gpu()
    image, first_token, steps = map(list, zip(*answers[what.warmup :], strict=True))
    return Record(
        contender=loaded.facts,
        software={"python": platform.python_version(), **versions(("monoedge", *BACKENDS, "numpy"))},
        prompt_tokens=questions.visual_tokens + what.text_tokens,
        visual_tokens=questions.visual_tokens,
        load=load_seconds,
        cold_first_token=answers[0][1],
        image=image,
        first_token=first_token,
        steps=steps,
        memory=memory.most,
        weight_bytes=loaded.weight_bytes(),
    )


class _Questions:
    """Makes prompts of exactly the workload's size: random text tokens around those of a random picture."""

    def __init__(self, what: Workload, loaded: Loaded) -> None:
        random = np.random.default_rng(0)
        self.loaded, self.visual_tokens = loaded, 0
        self.encoding = 0.0
        """Seconds that the last picture took to encode."""
        self._cut: Callable[[], npt.NDArray[np.float32]] | None = None
        if what.tiles:
            processor = loaded.image_processor
            if processor is None:
                raise OptionError("--tiles: this model sees no pictures: ask with --tiles 0")
            grid = _grid(processor, what.tiles)
            self.visual_tokens = what.tiles * processor.tokens_per_tile
            shape = (processor.image_size, processor.image_size * grid, 3)
            self._cut = partial(processor, random.integers(0, 256, shape, dtype=np.uint8), grid)
        total = self.visual_tokens + what.text_tokens
        if total + what.new_tokens > loaded.backend.max_length:
            raise PromptError(
                f"the prompt has {total} tokens and {what.new_tokens} are to follow, together "
                f"{total + what.new_tokens}, but {loaded.backend.length_limit}: measure less"
            )
        self._ids = random.integers(0, loaded.vocab_size, total)
        self._ids[self._ids == loaded.image_id] = 0
        # As a system message stands before the picture and the question after it.
        first = what.text_tokens // 2
        self._visual_mask = np.zeros(total, np.bool_)
        self._visual_mask[first : first + self.visual_tokens] = True
        self._ids[self._visual_mask] = loaded.image_id

    def prompt(self) -> Prompt:
        """Returns the prompt, its picture cut into tiles each time."""
        images = (HostPixels(self._cut(), self._encode),) if self._cut else ()
        return Prompt(self._ids, self._visual_mask, self._ids, images)

    def _encode(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        started = time.perf_counter()
        result = self.loaded.backend.encode_image(pixel_values)
        self.encoding = time.perf_counter() - started
        return result


def _grid(processor: ImageProcessor, tiles: int) -> int:
    """Returns the columns of a one-row grid that has so many tiles, its thumbnail included."""
    size = processor.image_size
    grids = range(processor.min_tiles, processor.max_tiles + 1) if processor.dynamic_image_size else (1,)
    possible = {processor.tiles(columns * size, size, columns): columns for columns in grids}
    if tiles not in possible:
        expected = f"expected one of 0, {', '.join(map(str, possible))}"
        raise OptionError(f"--tiles: no picture is cut into {tiles} tiles, the thumbnail counted; {expected}")
    return possible[tiles]


def _answer(questions: _Questions, new_tokens: int, memory: MemoryWatch) -> tuple[float, float, list[float]]:
    """Returns the seconds of the picture, to the first token, and of each token after it."""
    sampler = Sampler(SamplingOptions())
    started = time.perf_counter()
    prompt = questions.prompt()
    cut = time.perf_counter() - started
    sequence = Sequence(questions.loaded.backend, questions.loaded.embed)
    logits = sequence.prefill(prompt, lambda: False)
    assert logits is not None  # noqa: S101 - only when cancelled
    ids = [sampler.next(logits, [])]
    first_token = time.perf_counter() - started
    memory.sample()
    steps = []
    for _ in range(new_tokens - 1):
        started = time.perf_counter()
        ids.append(sampler.next(sequence.step(ids[-1]), ids))
        steps.append(time.perf_counter() - started)
    memory.sample()
    return cut + questions.encoding, first_token, steps
