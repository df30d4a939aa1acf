"""The caches of one sequence, and runs of a decoder on them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime.backends import Array, graph
from runtime.bundle.manifest import VISUAL_DECODER_GRAPH
from runtime.errors import BackendError, as_backend_error

if TYPE_CHECKING:
    from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

TYPES = {
    "tensor(float)": ("<f4", 1),
    "tensor(float16)": ("<f2", 10),
    "tensor(bfloat16)": ("<u2", 16),
    "tensor(int8)": ("i1", 3),
}
"""Number formats, by what ONNX Runtime calls them: how numpy holds them, and their numbers in ONNX."""


@dataclass(frozen=True)
class _Bound:
    """A decoder with what one sequence binds to it."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    inputs: frozenset[str]
    has_logits: bool
    others: list[str]  # Outputs that are neither logits nor caches.

    @classmethod
    def to(cls, session: ort.InferenceSession) -> _Bound:
        inputs, outputs = ([item.name for item in items] for items in (session.get_inputs(), session.get_outputs()))
        others = [name for name in outputs if not name.startswith((graph.LOGITS, graph.PRESENT, graph.UPDATE))]
        bound = cls(session, session.io_binding(), frozenset(inputs), graph.LOGITS in outputs, others)
        # Before all other outputs: ``get_outputs`` has the order in which they were bound first.
        bound.bind_others()
        return bound

    def bind_others(self) -> None:
        """Lets ONNX Runtime allocate them in the next run; those of the last run have its size."""
        for name in self.others:
            self.binding.bind_output(name)


class OnnxRuntimeContext:
    """Caches of our own, bound as inputs and outputs at once, so that each step writes in place.

    They lie on the backend's device; on the CPU they are numpy arrays. Where the graph gives updates instead of caches,
    they are written after each step.
    """

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._decoder = _Bound.to(backend.decoder)
        self._visual_decoder: _Bound | None = None
        inputs = {item.name: TYPES[item.type] for item in backend.decoder.get_inputs() if item.type in TYPES}
        _, self._element = inputs[graph.INPUTS_EMBEDS]
        self._updates = any(item.name.startswith(graph.UPDATE) for item in backend.decoder.get_outputs())
        new = graph.UPDATE if self._updates else graph.PRESENT
        self._types = {name: kind for name, kind in inputs.items() if name.startswith(graph.PAST)}
        self._pairs = [(name, new + name.removeprefix(graph.PAST)) for name in self._types]
        self._caches: list[Array] = []  # Where they lie on the CPU.
        self._values: list[ort.OrtValue] = []

    def reserve(self, capacity: int) -> None:
        """Grows the caches to at least ``capacity`` tokens; what they hold stays."""
        if capacity <= self.capacity:
            return
        backend, model, on_cpu = self._backend, self._backend.bundle.manifest.model, self._backend.device == "cpu"
        # On a GPU all that there can be, since what lies there is not copied.
        capacity = max([capacity, *(cache.shape[2] for cache in self._caches)]) if on_cpu else backend.max_length
        shape = (1, model.num_key_value_heads, capacity, model.head_dim)
        caches, values = [], []
        try:
            for index, (kind, _) in enumerate(self._types.values()):
                # Zeros, not empty: what is masked is multiplied by 0, and 0 · NaN would be NaN.
                cache = np.zeros(shape, kind)
                if self._caches:
                    cache[:, :, : self._caches[index].shape[2]] = self._caches[index]
                with as_backend_error(f"the caches for {capacity} tokens do not fit"):
                    values.append(ort.OrtValue.ortvalue_from_numpy(cache, backend.device, 0))
                caches += [cache] if on_cpu else []
        except MemoryError:
            size = np.prod(shape) * sum(np.dtype(kind).itemsize for kind, _ in self._types.values())
            raise BackendError(
                f"the caches for {capacity} tokens need {size / 1e9:.2f} GB, which is not there: ask for fewer "
                "tokens (max_new_tokens) or smaller images (max_tiles)"
            ) from None
        self.capacity = 0  # So that what an interrupt cuts short is done again.
        self._caches, self._values = caches, values
        for decoder in filter(None, (self._decoder, self._visual_decoder)):
            self._bind_caches(decoder)
        self.capacity = capacity

    def _bind_caches(self, decoder: _Bound) -> None:
        for (past, present), value, (_, element) in zip(self._pairs, self._values, self._types.values(), strict=True):
            # By address, since an OrtValue made of numpy's uint16 is no bfloat16.
            where = (self._backend.device, 0, element, value.shape(), value.data_ptr())
            # What gives updates reads no cache where it computes no attention: the visual decoder's last layer.
            if past in decoder.inputs:
                decoder.binding.bind_input(past, *where)
            if not self._updates:
                decoder.binding.bind_output(present, *where)

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array | None:
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        if not self._backend.bundle.manifest.by_expert:
            return self._run(self._decoder, inputs_embeds, visual_mask, start)
        logits = None
        bounds = [0, *(np.flatnonzero(np.diff(visual_mask)) + 1), len(visual_mask)]
        for begin, end in itertools.pairwise(bounds):
            decoder = self._visual() if visual_mask[begin] else self._decoder
            stretch = slice(begin, end)
            logits = self._run(decoder, inputs_embeds[stretch], visual_mask[stretch], start + int(begin))
        return logits

    def _visual(self) -> _Bound:
        if self._visual_decoder is None:
            decoder = _Bound.to(self._backend.graph(VISUAL_DECODER_GRAPH))
            self._bind_caches(decoder)
            self._visual_decoder = decoder
        return self._visual_decoder

    def _run(
        self, decoder: _Bound, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int
    ) -> Array | None:
        binding, stop = decoder.binding, start + len(inputs_embeds)
        positions = np.arange(start, stop, dtype=np.int64)
        values = {
            graph.INPUTS_EMBEDS: np.ascontiguousarray(inputs_embeds[None], self._backend.dtype),
            graph.VISUAL_MASK: np.ascontiguousarray(visual_mask[None]),
            graph.POSITION_IDS: positions[None],
            graph.WRITE_INDICES: positions[:1],
        }
        for name, value in values.items():
            if name == graph.INPUTS_EMBEDS:
                binding.bind_input(name, "cpu", 0, self._element, value.shape, value.ctypes.data)
            elif name in decoder.inputs:
                binding.bind_cpu_input(name, value)
        decoder.bind_others()
        logits = None
        if decoder.has_logits:
            logits = np.empty((1, self._backend.bundle.manifest.model.vocab_size), np.float32)
            binding.bind_ortvalue_output(graph.LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        places = [cache[:, :, start:stop] for cache in self._caches if self._updates]
        updates = [(place, np.empty_like(place, order="C")) for place in places]
        for (_, name), (_, update) in zip(self._pairs, updates, strict=False):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(update))
        with as_backend_error(f"ONNX Runtime failed on tokens {start} to {stop}"):
            decoder.session.run_with_iobinding(binding)
        for place, update in updates:
            place[...] = update
        if self._backend.observer is not None:
            caches = {past: cache for (past, _), cache in zip(self._pairs, self._caches, strict=True)}
            outputs = {name: value.numpy() for name, value in zip(decoder.others, binding.get_outputs(), strict=False)}
            self._backend.observer(values | caches, outputs)
        return None if logits is None else logits[0]
