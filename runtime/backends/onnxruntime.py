"""ONNX Runtime on the CPU. The function bodies in the graphs are its implementation of the custom operators.

A bundle made for it has a decoder for each kind of tokens (``Manifest.by_expert``). A chunk then is computed in
stretches of one kind, on the same caches. That of visual tokens, and the vision graph, are opened by the first image.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.checks import check_graph, link_advice
from runtime.bundle.manifest import CPU, DECODER_GRAPH, PRECISIONS, VISION_GRAPH, VISUAL_DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError, as_backend_error
from runtime.packages import install_command

try:
    import onnxruntime as ort
except ImportError:
    raise BackendError(f"onnxruntime is not installed; this installs it: {install_command('onnxruntime')}") from None

MINIMUM_VERSIONS = {20: (1, 17), 24: (1, 25)}
"""By the opset of a bundle, the first release with CPU kernels for it: 1.24 parses TensorScatter and has none."""

INT8_CACHES_VERSION = (1, 27)
"""The first release whose CPU kernel of GroupQueryAttention takes INT8 caches: 1.26 opens the graph, then fails."""

CACHE_TYPES = {"tensor(float)": "<f4", "tensor(float16)": "<f2", "tensor(int8)": "i1"}
"""Number formats of caches, by what ONNX Runtime calls the inputs."""

PROVIDERS = ["CPUExecutionProvider"]

CHUNK = 512
"""Tokens of a prompt that are computed at a time. It bounds the memory of long prompts: attention scores and expert
activations grow with it."""


class OnnxRuntimeBackend:
    """The graphs of a bundle on ONNX Runtime's CPU provider.

    Args:
        bundle: what to run; fp32 or fp16.
        threads: threads to compute with; None for ONNX Runtime's choice, one a physical core.
        graphs: graphs that run in place of the bundle's, by the name of the file.
        observer: called after each run of a decoder.

    Raises:
        BackendError: the bundle's number format has no kernels on a CPU, or ONNX Runtime is too old.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        graphs: Mapping[str, graph.GraphInMemory] | None = None,
        observer: graph.Observer | None = None,
    ) -> None:
        self.bundle, self.threads, self.observer = bundle, threads, observer
        self._graphs = graphs or {}
        self._require_format()
        self._require_version()
        self.chunk, self.max_length = CHUNK, bundle.manifest.model.max_length
        self.length_limit = bundle.length_limit
        self.dtype = PRECISIONS[bundle.manifest.precision]
        self._opened: dict[str, ort.InferenceSession] = {}
        self._lock = threading.Lock()
        self.decoder = self.graph(DECODER_GRAPH)
        self.description = f"onnxruntime {ort.__version__}, CPU"

    def _require_format(self) -> None:
        if self.bundle.manifest.precision == "bf16":
            raise BackendError(f"{self.bundle.folder} holds bf16, which needs a GPU: export it with --dtype fp32")

    def _require_version(self) -> None:
        manifest, remedy = self.bundle.manifest, "pip install -U onnxruntime"
        minimum = MINIMUM_VERSIONS.get(manifest.opset, max(MINIMUM_VERSIONS.values()))
        what = f"opset {manifest.opset}"
        if manifest.quantization is not None and manifest.quantization.kv_cache:
            minimum, what = INT8_CACHES_VERSION, "INT8 caches"
            remedy += " (Python 3.11 or later), or make the bundle without --kv-cache"
        elif manifest.opset > min(MINIMUM_VERSIONS):
            remedy += " (Python 3.11 or later), or export the bundle with --target trt10.3, whose graphs are older"
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < minimum:
            raise BackendError(
                f"onnxruntime {ort.__version__} is too old for {what}, expected "
                f"{'.'.join(map(str, minimum))} or later: {remedy}"
            )

    def _open(self, graph: str) -> ort.InferenceSession:
        quantization = self.bundle.manifest.quantization
        prepacked = graph != VISION_GRAPH and quantization is not None and quantization.form == CPU
        path, options = self.bundle.path(graph), self._options(prepacked)
        with as_backend_error(f"ONNX Runtime cannot load {path}{link_advice(self.bundle, graph)}"):
            if graph not in self._graphs:
                return ort.InferenceSession(path, options, providers=PROVIDERS, enable_fallback=0)
            model, weights = self._graphs[graph].model, self._graphs[graph].weights
            folder = str(self.bundle.folder.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
            return ort.InferenceSession(model, options, providers=PROVIDERS, enable_fallback=0)

    def _options(self, prepacked: bool = False) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # A plan of memory for every length of a prompt: 0.2 GB with three layers of the full size, and no faster.
        options.enable_mem_pattern = False
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # Prepacked weights would be a second copy in anonymous memory. Without it they stay in the mapped file,
        # shared and evictable, and one row (decoding) runs at memory bandwidth; many rows lose some 15 %.
        # MatMulNBits computes in INT8 only what is prepacked, and is some 200 times slower otherwise.
        options.add_session_config_entry("session.disable_prepacking", "0" if prepacked else "1")
        return options

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        """Takes [tiles, 3, size, size] to [tiles · tokens_per_tile, hidden], one tile at a time."""
        vision = self.graph(VISION_GRAPH)
        with as_backend_error("ONNX Runtime failed on the image"):
            tiles = (tile[None].astype(self.dtype, copy=False) for tile in pixel_values)
            return np.concatenate([vision.run(None, {graph.PIXEL_VALUES: tile})[0][0] for tile in tiles])

    def graph(self, name: str) -> ort.InferenceSession:
        """Opens a graph when it is first asked for: a text conversation needs no vision."""
        with self._lock:
            if name not in self._opened:
                session = self._open(name)
                self._opened[name] = session if name in self._graphs else check_graph(self.bundle, name, session)
            return self._opened[name]

    def new_context(self) -> OnnxRuntimeContext:
        """Returns empty caches for a new sequence."""
        return OnnxRuntimeContext(self)


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
    """Caches in memory of our own, bound as inputs and outputs at once, so that each step writes in place.

    Where the graph gives updates instead of caches, they are written after each step.
    """

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._decoder = _Bound.to(backend.decoder)
        self._visual_decoder: _Bound | None = None
        inputs = [item for item in backend.decoder.get_inputs() if item.name.startswith(graph.PAST)]
        self._types = [np.dtype(CACHE_TYPES[item.type]) for item in inputs]
        self._updates = any(item.name.startswith(graph.UPDATE) for item in backend.decoder.get_outputs())
        new = graph.UPDATE if self._updates else graph.PRESENT
        self._pairs = [(item.name, new + item.name.removeprefix(graph.PAST)) for item in inputs]
        self._caches: list[Array] = []

    def reserve(self, capacity: int) -> None:
        """Grows the caches to at least ``capacity`` tokens; what they hold stays."""
        if capacity <= self.capacity:
            return
        model = self._backend.bundle.manifest.model
        shape = (1, model.num_key_value_heads, capacity, model.head_dim)
        grown = []
        try:
            for index, kind in enumerate(self._types):
                # Zeros, not empty: what is masked is multiplied by 0, and 0 · NaN would be NaN.
                cache = np.zeros(shape, kind)
                if self._caches:
                    cache[:, :, : self.capacity] = self._caches[index][:, :, : self.capacity]
                grown.append(cache)
        except MemoryError:
            size = np.prod(shape) * sum(kind.itemsize for kind in self._types)
            raise BackendError(
                f"the caches for {capacity} tokens need {size / 1e9:.2f} GB, which is not there: ask for fewer "
                "tokens (max_new_tokens) or smaller images (max_tiles)"
            ) from None
        self._caches = grown
        self._bind_caches(self._decoder)
        if self._visual_decoder is not None:
            self._bind_caches(self._visual_decoder)
        self.capacity = capacity  # Last, so that what an interrupt cuts short is done again.

    def _bind_caches(self, decoder: _Bound) -> None:
        for (past, present), cache in zip(self._pairs, self._caches, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            # What gives updates reads no cache where it computes no attention: the visual decoder's last layer.
            if past in decoder.inputs:
                decoder.binding.bind_ortvalue_input(past, value)
            if not self._updates:
                decoder.binding.bind_ortvalue_output(present, value)

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
        binding = decoder.binding
        stop = start + len(inputs_embeds)
        positions = np.arange(start, stop, dtype=np.int64)
        values = {
            graph.INPUTS_EMBEDS: np.ascontiguousarray(inputs_embeds[None], self._backend.dtype),
            graph.VISUAL_MASK: np.ascontiguousarray(visual_mask[None]),
            graph.POSITION_IDS: positions[None],
            graph.WRITE_INDICES: positions[:1],
        }
        for name, value in values.items():
            if name in decoder.inputs:
                binding.bind_cpu_input(name, value)
        decoder.bind_others()
        logits = None
        if decoder.has_logits:
            logits = np.empty((1, self._backend.bundle.manifest.model.vocab_size), np.float32)
            binding.bind_ortvalue_output(graph.LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        updates = []
        if self._updates:
            places = [cache[:, :, start:stop] for cache in self._caches]
            updates = [(place, np.empty_like(place, order="C")) for place in places]
            for (_, name), (_, update) in zip(self._pairs, updates, strict=True):
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
