"""Observation: the bundle answers questions on ONNX Runtime, and the inputs of its matrices are recorded.

The decoder is the bundle's own, with the inputs of its matrices as further outputs. Its weights stay in the mapped
file. The inputs of one chunk of a prompt (``runtime.backends.onnxruntime.backend.CHUNK`` tokens) are in memory at once,
which is 0.5 GB for the text experts at full size. Prompts are cut into chunks as the runtime cuts them, because the
last layer computes only the last position of each chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration import CalibrationError
from calibration.data import Example
from calibration.observed.record import Record
from calibration.observed.statistics import HALVES, PHASES, priorities
from calibration.trial.prober import Prober
from export.quantized.quantizable import Matrix, expose, find_matrices
from export.quantized.weights import DecoderWeights
from runtime.backends import Array
from runtime.backends.graph import PAST, POSITION_IDS, GraphInMemory
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.model import Model

SAVE_EVERY = 30.0
"""Seconds between saves. An interrupted run loses no more than this and one example."""

_NOT_FINITE = "the weights are damaged, or too large for the number format: export the bundle again, as fp32"


def observe(
    weights: DecoderWeights,
    examples: Sequence[Example],
    record: Record,
    file: Path,
    progress: Callable[[int], object],
    threads: int | None = None,
) -> None:
    """Observes the examples that a record lacks, and saves it from time to time and at the end.

    Args:
        weights: the decoder of the unquantized bundle.
        examples: all of them, in the record's order.
        record: what has been observed before. It is completed.
        file: where the record is saved.
        progress: called with the number of examples just done.
        threads: CPU threads to compute with; None for ONNX Runtime's choice.

    Raises:
        CalibrationError: values that are not finite, with the layer and the example; or no row ever reached a matrix.
    """
    known = {matrix.name: matrix for matrix in find_matrices(weights.model)}
    matrices = [known[name] for name in record.origin.matrices]
    observation = _Observation(record, matrices)
    graphs = {DECODER_GRAPH: GraphInMemory(expose(weights.model, matrices).SerializeToString())}
    backend = OnnxRuntimeBackend(weights.bundle, threads, graphs, observation.take)
    prober = Prober(Model(weights.bundle, backend), record.origin.max_tiles, record.origin.max_new_tokens)
    progress(record.done)
    saved = time.monotonic()
    for index, example in enumerate(examples[record.done :], record.done):
        prompt, given = prober.prompt_and_answer(example)
        observation.begin(index, example.place)
        for _ in prober.answer(prompt) if given is None else prober.along(prompt, given):
            # All logits after the first are computed from tokens of the answer.
            observation.phase = "generated"
        record.done = index + 1
        if time.monotonic() - saved >= SAVE_EVERY and not record.complete:
            record.save(file)
            saved = time.monotonic()
        progress(1)
    _require_rows(record, matrices)
    record.save(file)


class _Observation:
    """Adds what reaches matrices and caches to a record."""

    def __init__(self, record: Record, matrices: Sequence[Matrix]) -> None:
        self._record, self._matrices = record, matrices
        self.begin(0, "")

    def begin(self, example: int, place: str) -> None:
        self._example, self._place, self._piece, self.phase = example, place, 0, "prompt"

    def take(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Takes in one run of the decoder; see ``runtime.backends.graph.Observer``."""
        seed, half = self._record.origin.seed, self._example % HALVES
        for matrix in self._matrices:
            rows, statistics = outputs[matrix.output], self._record.observed[matrix.name][half]
            drawn = priorities(seed, self._example, PHASES.index(self.phase), self._piece, len(rows))
            if not getattr(statistics, self.phase).update(rows, drawn):
                raise CalibrationError(f"{matrix.name} is given NaN or infinite values in {self._place}: {_NOT_FINITE}")
        positions = inputs[POSITION_IDS][0]
        for name, cache in inputs.items():
            if name.startswith(PAST):
                self._take_cache(name.removeprefix(PAST), cache[0, :, positions[0] : positions[-1] + 1])
        self._piece += 1

    def _take_cache(self, cache: str, rows: Array) -> None:
        largest = np.abs(rows).max(axis=1).astype(np.float32)
        if not np.isfinite(largest).all():
            raise CalibrationError(f"the cache {cache} has NaN or infinite values in {self._place}: {_NOT_FINITE}")
        self._record.caches[cache] = np.maximum(self._record.caches.get(cache, largest), largest)


def _require_rows(record: Record, matrices: Sequence[Matrix]) -> None:
    """Refuses a record in which no row reached some matrix.

    The visual expert of the last layer may have none: that layer computes only last positions, which are text tokens.
    """
    last = max((matrix.layer for matrix in matrices if matrix.layer is not None), default=None)
    for matrix in matrices:
        if not any(half.rows for half in record.observed[matrix.name]) and not (
            matrix.expert == "visual" and matrix.layer == last
        ):
            advice = "add data with pictures, or use --experts text" if matrix.expert == "visual" else "use other data"
            raise CalibrationError(f"none of the data reaches the {matrix.expert} expert of {matrix.name}: {advice}")
