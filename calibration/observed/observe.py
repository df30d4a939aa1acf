"""Observation: the bundle answers questions on ONNX Runtime; what reaches its matrices and its caches is counted.

The decoder that runs is the bundle's own, with the bodies of its operators brought to light; its weights stay in the
mapped file. All inputs of one piece of a prompt (``runtime.generation.CHUNK`` tokens) are in memory at once, at full
size 0.5 GB for the text experts, and are dropped once they are counted. The runtime's own pieces are kept, because
the last layer computes only the last position of each: what it never computes is not counted either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from calibration.data import Example
from calibration.errors import CalibrationError
from calibration.observed.record import Record
from calibration.observed.statistics import HALVES, PHASES, priorities
from calibration.trial.backend import GraphBackend
from calibration.trial.prober import Prober
from export.quantized.quantizable import Matrix, expose
from runtime.backends import Array
from runtime.backends.graph import PAST
from runtime.backends.onnxruntime import OnnxRuntimeContext
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.model import Model

SAVE_EVERY = 30.0
"""Seconds after which what has been observed is saved: what an interrupted run loses at most, and one example."""

Seen = Callable[[str, npt.NDArray[Any]], None]
"""Told a matrix and the rows in front of it, [rows, channels]."""

SeenCache = Callable[[str, npt.NDArray[Any]], None]
"""Told a cache and what a piece of a sequence wrote into it, [kv_heads, rows, head_dim]."""


_NOT_FINITE = "the bundle's weights or number format do not fit; export it again, as fp32"


class ObservingBackend(GraphBackend):
    """ONNX Runtime over a bundle, telling the inputs of some matrices, and new keys and values, after each piece of a
    sequence.

    Args:
        bundle: what to run.
        graph: its decoder without weights.
        matrices: the matrices.
        seen: told each matrix once a piece.
        seen_cache: told each cache once a piece.
        threads: as the runtime takes them.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: onnx.ModelProto,
        matrices: Sequence[Matrix],
        seen: Seen,
        seen_cache: SeenCache,
        threads: int | None = None,
    ) -> None:
        self.matrices, self.seen, self.seen_cache = matrices, seen, seen_cache
        super().__init__(bundle, {DECODER_GRAPH: expose(graph, matrices)}, {}, threads)

    def new_context(self) -> OnnxRuntimeContext:
        """Empty caches for a new sequence."""
        return _ObservingContext(self)


class _ObservingContext(OnnxRuntimeContext):
    def __init__(self, backend: ObservingBackend) -> None:
        super().__init__(backend)
        self._observer = backend
        # Bound before all others, since outputs are given in the order in which they were bound first.
        self._bind()

    def _bind(self) -> None:
        for matrix in self._observer.matrices:
            self._binding.bind_output(matrix.output)

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array | None:
        self._bind()  # what is bound still has the last piece's size
        logits = super().forward(inputs_embeds, visual_mask, start)
        for matrix, value in zip(self._observer.matrices, self._binding.get_outputs(), strict=False):
            self._observer.seen(matrix.name, value.numpy())
        rows = slice(start, start + len(inputs_embeds))
        for (past, _), cache in zip(self._pairs, self._caches, strict=True):
            self._observer.seen_cache(past.removeprefix(PAST), cache[0, :, rows])
        return logits


def observe(
    bundle: Bundle,
    graph: onnx.ModelProto,
    matrices: Sequence[Matrix],
    examples: Sequence[Example],
    record: Record,
    file: Path,
    progress: Callable[[int], object],
    threads: int | None = None,
    save_every: float = SAVE_EVERY,
) -> None:
    """Observes those examples that a record lacks, and saves it from time to time and at the end.

    Args:
        bundle: the unquantized bundle.
        graph: its decoder without weights.
        matrices: the matrices that the record is about.
        examples: all of them, in the record's order.
        record: what has been observed before; it is completed.
        file: where it is saved.
        progress: called with the number of examples just done.
        threads: as the runtime takes them.
        save_every: seconds between saves.

    Raises:
        CalibrationError: values that are not finite, with the layer and the example; or no row ever reached a matrix.
    """
    observation = _Observation(record, matrices)
    backend = ObservingBackend(bundle, graph, matrices, observation.take, observation.take_cache, threads)
    prober = Prober(Model(bundle, backend), record.origin.max_tiles, record.origin.max_new_tokens)
    progress(record.done)
    saved = time.monotonic()
    for index in range(record.done, len(examples)):
        observation.begin(index, examples[index].place)
        _ask(prober, examples[index], observation)
        record.done = index + 1
        if time.monotonic() - saved >= save_every and not record.complete:
            record.save(file)
            saved = time.monotonic()
        progress(1)
    _require_rows(record, matrices)
    record.save(file)


class _Observation:
    """Takes rows into a record, each to its phase."""

    def __init__(self, record: Record, matrices: Sequence[Matrix]) -> None:
        self._record = record
        self._sites = {matrix.name: matrix for matrix in matrices}
        self.phase = 0
        self._example, self._place = 0, ""
        self._pieces: dict[str, int] = {}

    def begin(self, example: int, place: str) -> None:
        self._example, self._place = example, place
        self._pieces = dict.fromkeys(self._sites, 0)

    def take(self, matrix: str, rows: npt.NDArray[Any]) -> None:
        piece = self._pieces[matrix]
        self._pieces[matrix] += 1
        drawn = priorities(self._record.origin.seed, self._example, self.phase, piece, len(rows))
        half = self._record.observed[matrix][self._example % HALVES]
        if not getattr(half, PHASES[self.phase]).update(rows, drawn):
            raise CalibrationError(f"{matrix}: its input has NaN or infinite values in {self._place}: {_NOT_FINITE}")

    def take_cache(self, cache: str, rows: npt.NDArray[Any]) -> None:
        largest = np.abs(rows).max(axis=1).astype(np.float32)
        if not np.isfinite(largest).all():
            raise CalibrationError(f"the cache {cache} has NaN or infinite values in {self._place}: {_NOT_FINITE}")
        known = self._record.caches.get(cache)
        self._record.caches[cache] = largest if known is None else np.maximum(known, largest)


def _ask(prober: Prober, example: Example, observation: _Observation) -> None:
    prompt, given = prober.prompt_and_answer(example)
    observation.phase = PHASES.index("prompt")
    for _ in prober.answer(prompt) if given is None else prober.along(prompt, given):
        # What follows the first logits is computed of tokens of the answer.
        observation.phase = PHASES.index("generated")


def _require_rows(record: Record, matrices: Sequence[Matrix]) -> None:
    """The last layer computes the last position only, always a text token: its visual expert is left out of this."""
    last = max((matrix.layer for matrix in matrices if matrix.layer is not None), default=None)
    for matrix in matrices:
        if not any(half.rows for half in record.observed[matrix.name]) and not (
            matrix.expert == "visual" and matrix.layer == last
        ):
            advice = "give data with pictures, or --experts text" if matrix.expert == "visual" else "give other data"
            raise CalibrationError(f"no row of the data reaches the {matrix.expert} expert of {matrix.name}: {advice}")
