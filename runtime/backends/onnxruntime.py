"""ONNX Runtime on the CPU. The function bodies in the graphs are its implementation of the custom operators."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.graph import PIXEL_VALUES, UPDATE
from runtime.backends.limits import bundle_length_limit
from runtime.bundle import CPU, DECODER_GRAPH, PRECISIONS, VISION_GRAPH, Bundle
from runtime.errors import BackendError

try:
    import onnxruntime as ort
except ImportError:
    raise BackendError("onnxruntime is not installed; this adds it: pip install 'monoedge[cpu]'") from None

Array = npt.NDArray[Any]

MINIMUM_VERSIONS = {20: (1, 17), 24: (1, 25)}
"""By the opset of a bundle, the first release with CPU kernels for it: 1.24 parses TensorScatter and has none."""

PROVIDERS = ["CPUExecutionProvider"]

CHUNK = 512
"""Tokens of a prompt that are computed at a time. It bounds the memory of long prompts: attention scores and expert
activations grow with it."""


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """What ONNX Runtime raises, classes of its C++ module without a common base, as one line of ours."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"{what}: {' '.join(str(error).split())}") from None


class OnnxRuntimeBackend:
    """The graphs of a bundle on ONNX Runtime's CPU provider.

    Args:
        bundle: what to run; fp32 or fp16.
        threads: threads to compute with; None for ONNX Runtime's choice, one a physical core.

    Raises:
        BackendError: the bundle's number format has no kernels on a CPU, or ONNX Runtime is too old.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle, self.threads = bundle, threads
        self._require_format()
        opset = bundle.manifest.opset
        minimum = MINIMUM_VERSIONS.get(opset, max(MINIMUM_VERSIONS.values()))
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < minimum:
            remedy = "pip install -U onnxruntime"
            if opset > min(MINIMUM_VERSIONS):
                remedy += " (Python 3.11 or later), or export the bundle with --target trt10.3, whose graphs are older"
            raise BackendError(
                f"onnxruntime {ort.__version__} is too old for opset {opset}, expected "
                f"{'.'.join(map(str, minimum))} or later: {remedy}"
            )
        self.chunk, self.max_length = CHUNK, bundle.manifest.model.max_length
        self.length_limit = bundle_length_limit(bundle)
        self.dtype = PRECISIONS[bundle.manifest.precision]
        self.decoder = self._open(DECODER_GRAPH)
        self.description = f"onnxruntime {ort.__version__}, CPU"
        self._vision: ort.InferenceSession | None = None
        self._lock = threading.Lock()

    def _require_format(self) -> None:
        if self.bundle.manifest.precision == "bf16":
            raise BackendError(
                f"{self.bundle.folder} holds bf16, for which ONNX Runtime has no CPU kernels: export it with --dtype "
                "fp32"
            )

    def _open(self, graph: str) -> ort.InferenceSession:
        quantization = self.bundle.manifest.quantization
        prepacked = graph == DECODER_GRAPH and quantization is not None and quantization.form == CPU
        with telling(f"ONNX Runtime cannot load {self.bundle.path(graph)}"):
            return ort.InferenceSession(self.bundle.path(graph), self._options(prepacked), providers=PROVIDERS)

    def _options(self, prepacked: bool = False) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # Prepacked weights would be a second copy in anonymous memory. Without it they stay in the mapped file,
        # shared and evictable, and one row (decoding) runs at memory bandwidth; many rows lose some 15 %.
        # MatMulNBits computes in INT8 only what is prepacked, and is some 200 times slower otherwise.
        options.add_session_config_entry("session.disable_prepacking", "0" if prepacked else "1")
        return options

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        """[tiles, 3, size, size] → [tiles · tokens_per_tile, hidden]."""
        # Opened with the first image: a text conversation never needs it.
        with self._lock:
            if self._vision is None:
                self._vision = self._open(VISION_GRAPH)
        with telling("ONNX Runtime failed on the image"):
            tiles = [self._encode(self._vision, pixel_values[i : i + 1]) for i in range(len(pixel_values))]
        return np.concatenate(tiles)

    def _encode(self, session: ort.InferenceSession, pixel_values: npt.NDArray[np.float32]) -> Array:
        """[1, 3, size, size] → [tokens_per_tile, hidden]."""
        embeds: Array = session.run(None, {PIXEL_VALUES: pixel_values.astype(self.dtype, copy=False)})[0][0]
        return embeds

    def new_context(self) -> OnnxRuntimeContext:
        """Empty caches for a new sequence."""
        return OnnxRuntimeContext(self)


class OnnxRuntimeContext:
    """Caches in memory of our own, bound as inputs and outputs at once, so that each step writes in place.

    Where the graph gives updates instead of caches, they are written after each step.
    """

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._binding = backend.decoder.io_binding()
        # Calibration looks into the graph through further outputs, behind the caches.
        pasts, presents = backend.decoder.get_inputs()[4:], backend.decoder.get_outputs()[1:]
        self._pairs = [(past.name, present.name) for past, present in zip(pasts, presents, strict=False)]
        self._caches: list[Array] = []

    def reserve(self, capacity: int) -> None:
        """Grows the caches to at least ``capacity`` tokens; what they hold stays."""
        if capacity <= self.capacity:
            return
        model = self._backend.bundle.manifest.model
        shape = (1, model.num_key_value_heads, capacity, model.head_dim)
        grown = []
        try:
            for index in range(len(self._pairs)):
                # Zeros, not empty: what is masked is multiplied by 0, and 0 · NaN would be NaN.
                cache = np.zeros(shape, self._backend.dtype)
                if self._caches:
                    cache[:, :, : self.capacity] = self._caches[index]
                grown.append(cache)
        except MemoryError:
            size = len(self._pairs) * np.prod(shape) * self._backend.dtype.itemsize
            raise BackendError(
                f"the caches for {capacity} tokens need {size / 1e9:.2f} GB, which is not there: ask for fewer "
                "tokens (max_new_tokens) or smaller images (max_tiles)"
            ) from None
        self._caches, self.capacity = grown, capacity
        for (past, present), cache in zip(self._pairs, grown, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            self._binding.bind_ortvalue_input(past, value)
            if not present.startswith(UPDATE):
                self._binding.bind_ortvalue_output(present, value)

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array:
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        positions = np.arange(start, start + len(inputs_embeds), dtype=np.int64)
        self._binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(inputs_embeds[None], self._backend.dtype))
        self._binding.bind_cpu_input("visual_mask", np.ascontiguousarray(visual_mask[None]))
        self._binding.bind_cpu_input("position_ids", positions[None])
        self._binding.bind_cpu_input("write_indices", positions[:1])
        logits = np.empty((1, self._backend.bundle.manifest.model.vocab_size), np.float32)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        chunk = slice(start, start + len(inputs_embeds))
        updates = [
            (cache[:, :, chunk], np.empty_like(cache[:, :, chunk], order="C"), name)
            for (_, name), cache in zip(self._pairs, self._caches, strict=True)
            if name.startswith(UPDATE)
        ]
        for _, update, name in updates:
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(update))
        with telling(f"ONNX Runtime failed on tokens {start} to {start + len(inputs_embeds)}"):
            self._backend.decoder.run_with_iobinding(self._binding)
        for place, update, _ in updates:
            place[...] = update
        last: Array = logits[0]
        return last
