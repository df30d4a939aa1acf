"""ONNX Runtime on the CPU. The function bodies in the graphs are its implementation of the custom operators."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bundle import DECODER_GRAPH, PRECISIONS, VISION_GRAPH, Bundle
from runtime.errors import BackendError

try:
    import onnxruntime as ort
except ImportError:
    if sys.version_info < (3, 11):
        raise BackendError(
            f"onnxruntime 1.25 is needed, which needs Python 3.11 or later; this is Python {sys.version.split()[0]}"
        ) from None
    raise BackendError("onnxruntime is not installed; this adds it: pip install 'monoedge[cpu]'") from None

Array = npt.NDArray[Any]

MINIMUM_VERSION = (1, 25)
"""The first release whose CPU provider has TensorScatter (1.24 parses it and has no kernel)."""

PROVIDERS = ["CPUExecutionProvider"]


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
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
        if bundle.manifest.precision == "bf16":
            raise BackendError(
                f"{bundle.folder} holds bf16, for which ONNX Runtime has no CPU kernels: export it with --dtype fp32"
            )
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < MINIMUM_VERSION:
            raise BackendError(
                f"onnxruntime {ort.__version__} is too old, expected {'.'.join(map(str, MINIMUM_VERSION))} or later, "
                "which needs Python 3.11: pip install -U onnxruntime"
            )
        self.bundle, self.threads = bundle, threads
        self.dtype = PRECISIONS[bundle.manifest.precision]
        self.decoder = self._open(DECODER_GRAPH)
        self.description = f"onnxruntime {ort.__version__}, CPU"
        self._vision: ort.InferenceSession | None = None
        self._lock = threading.Lock()

    def _open(self, graph: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # Prepacked weights would be a second copy in anonymous memory. Without it they stay in the mapped file,
        # shared and evictable, and one row (decoding) runs at memory bandwidth; many rows lose some 15 %.
        options.add_session_config_entry("session.disable_prepacking", "1")
        with _telling(f"ONNX Runtime cannot load {self.bundle.path(graph)}"):
            return ort.InferenceSession(self.bundle.path(graph), options, providers=PROVIDERS)

    def encode_image(self, pixel_values: npt.NDArray[np.float32]) -> Array:
        """[tiles, 3, size, size] → [tiles · tokens_per_tile, hidden]."""
        # Opened with the first image: a text conversation never needs it.
        with self._lock:
            if self._vision is None:
                self._vision = self._open(VISION_GRAPH)
        with _telling("ONNX Runtime failed on the image"):
            tiles = [
                self._vision.run(None, {"pixel_values": pixel_values[i : i + 1].astype(self.dtype, copy=False)})[0]
                for i in range(len(pixel_values))
            ]
        return np.concatenate(tiles).reshape(-1, tiles[0].shape[-1])

    def new_context(self) -> OnnxRuntimeContext:
        """Empty caches for a new sequence."""
        return OnnxRuntimeContext(self)


class OnnxRuntimeContext:
    """Caches in memory of our own, bound as inputs and outputs at once, so that each step writes in place."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._binding = backend.decoder.io_binding()
        self._pairs = [
            (given.name, result.name)
            for given, result in zip(backend.decoder.get_inputs()[4:], backend.decoder.get_outputs()[1:], strict=True)
        ]
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
        with _telling(f"ONNX Runtime failed on tokens {start} to {start + len(inputs_embeds)}"):
            self._backend.decoder.run_with_iobinding(self._binding)
        last: Array = logits[0]
        return last
