"""ONNX Runtime on a GPU: by its CUDA provider, or by its TensorRT provider with our plugin library.

A graph is refused if ONNX Runtime would compute a part of it on another provider.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.checks import link_advice
from runtime.backends.cuda.device import require_no_threads, to_format
from runtime.backends.onnxruntime import CHUNK, OnnxRuntimeBackend
from runtime.backends.plugin_library import cache_folder, plugin_library
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError, as_backend_error

# isort: split
# After our own modules, which say how to install it.
import onnxruntime as ort

SHAPE_OPERATORS = frozenset({"Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Range"})
"""Operators that may run on the CPU, where ONNX Runtime computes shapes on purpose."""

ELEMENTS = {"fp32": 1, "fp16": 10, "bf16": 16}
"""The bundle's number formats as ONNX numbers them."""


class CudaProviderBackend(OnnxRuntimeBackend):
    """The graphs of a bundle on ONNX Runtime's CUDA provider.

    Args:
        bundle: what to run, of opset 24.
        threads: must be None.

    Raises:
        OptionError: ``threads`` was given.
        BackendError: the provider is missing, cannot be used, or does not compute all of a graph.
    """

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    device = "cuda"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        require_no_threads(self.name, threads)
        available = ort.get_available_providers()
        if self.provider not in available:
            raise BackendError(
                f"the onnxruntime {ort.__version__} that is installed has no {self.provider}, only "
                f"{', '.join(available)}: pip uninstall onnxruntime, then pip install onnxruntime-gpu (the two share "
                "one folder)"
            )
        if bundle.manifest.by_expert:
            raise BackendError(f"{bundle.folder} is made for the CPU: use backend onnxruntime, or a bundle for GPUs")
        super().__init__(bundle, None)
        if any(output.name.startswith(graph.UPDATE) for output in self.decoder.get_outputs()):
            raise BackendError(f"{bundle.folder} has graphs of opset {bundle.manifest.opset}: export it for opset 24")
        self.description = f"onnxruntime {ort.__version__}, {self.provider}"

    def _require_format(self) -> None:
        """Checks nothing: ``_open`` refuses what the GPU has no kernels for."""

    def _open(self, name: str) -> ort.InferenceSession:
        path, options = self.bundle.path(name), self._options()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # TensorRT needs fixed sizes.
        options.add_free_dimension_override_by_name("batch", 1)
        options.add_free_dimension_override_by_name("capacity", self.max_length)
        with as_backend_error(f"ONNX Runtime cannot load {path}{link_advice(self.bundle, name)}"):
            session = ort.InferenceSession(path, options, providers=self._providers(name), enable_fallback=0)
        if self.provider not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime cannot use its {self.provider}: install the CUDA, cuDNN and TensorRT that "
                f"onnxruntime {ort.__version__} was built for"
            )
        elsewhere = sorted(
            {
                f"{node.op_type} on {part.ep_name}"
                for part in session.get_provider_graph_assignment_info()
                for node in part.get_nodes()
                if part.ep_name != self.provider and node.op_type not in SHAPE_OPERATORS
            }
        )
        if elsewhere:
            raise BackendError(
                f"{self.provider} of onnxruntime {ort.__version__} does not compute all of {path}, but leaves "
                f"{', '.join(elsewhere)}: update onnxruntime-gpu, or use backend tensorrt"
            )
        return session

    def _providers(self, name: str) -> list[Any]:
        """Returns the ``providers`` of the session of a graph."""
        return [self.provider]

    def _encode(self, session: ort.InferenceSession, pixel_values: npt.NDArray[np.float32]) -> Array:
        manifest = self.bundle.manifest
        embeds = np.empty((manifest.image.tokens_per_tile, manifest.model.hidden_size), self.dtype)
        pixels = np.empty(pixel_values.shape, self.dtype)
        to_format(pixel_values, pixels)
        binding = session.io_binding()
        element = ELEMENTS[manifest.precision]
        binding.bind_input(graph.PIXEL_VALUES, "cpu", 0, element, pixels.shape, pixels.ctypes.data)
        binding.bind_output(graph.VISUAL_EMBEDS, "cpu", 0, element, (1, *embeds.shape), embeds.ctypes.data)
        session.run_with_iobinding(binding)
        return embeds

    def new_context(self) -> ProviderContext:  # type: ignore[override] # both are a Context
        """Returns empty caches for a new sequence."""
        return ProviderContext(self)


class TensorRTProviderBackend(CudaProviderBackend):
    """The graphs of a bundle on ONNX Runtime's TensorRT provider.

    It builds engines when it opens them, and keeps them in the cache folder.
    """

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def _providers(self, name: str) -> list[Any]:
        manifest = self.bundle.manifest
        folder = cache_folder() / "onnxruntime" / manifest.files[name].sha256[:16]
        options: dict[str, Any] = {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
            "trt_fp16_enable": manifest.precision == "fp16",
            "trt_bf16_enable": manifest.precision == "bf16",
        }
        if name == DECODER_GRAPH:
            options["trt_extra_plugin_lib_paths"] = str(plugin_library())
            # One profile, for chunks of prompts and for single tokens.
            for of, tokens in (("min", 1), ("opt", 1), ("max", CHUNK)):
                options[f"trt_profile_{of}_shapes"] = (
                    f"{graph.INPUTS_EMBEDS}:1x{tokens}x{manifest.model.hidden_size},"
                    f"{graph.VISUAL_MASK}:1x{tokens},{graph.POSITION_IDS}:1x{tokens}"
                )
        return [(self.provider, options)]


class ProviderContext:
    """Caches in device memory of ONNX Runtime, each bound as input and as output."""

    def __init__(self, backend: CudaProviderBackend) -> None:
        self.capacity = 0
        self._backend = backend
        self._binding = backend.decoder.io_binding()
        self._element = ELEMENTS[backend.bundle.manifest.precision]
        self._caches: list[ort.OrtValue] = []

    def reserve(self, capacity: int) -> None:
        """Allocates the caches, for as many tokens as the bundle allows."""
        if self._caches:
            return
        backend, model = self._backend, self._backend.bundle.manifest.model
        shape = (1, model.num_key_value_heads, backend.max_length, model.head_dim)
        # Zeros: masked values are multiplied by 0, and 0 · NaN would be NaN. Only the size of numpy's type matters.
        zeros = np.zeros(shape, backend.dtype if backend.dtype != np.uint16 else np.float16)
        for name in graph.cache_names(model.num_hidden_layers):
            with as_backend_error(f"the caches for {backend.max_length} tokens do not fit"):
                cache = ort.OrtValue.ortvalue_from_numpy(zeros.copy(), backend.device, 0)
            self._caches.append(cache)
            where = (backend.device, 0, self._element, shape, cache.data_ptr())
            self._binding.bind_input(graph.PAST + name, *where)
            self._binding.bind_output(graph.PRESENT + name, *where)
        self.capacity = backend.max_length

    def forward(self, inputs_embeds: Array, visual_mask: npt.NDArray[np.bool_], start: int) -> Array:
        """Runs tokens ``start`` … ``start + n``; returns the float32 logits of the last, [vocab]."""
        backend = self._backend
        embeds = np.ascontiguousarray(inputs_embeds[None], backend.dtype)
        positions = np.arange(start, start + len(inputs_embeds), dtype=np.int64)
        logits = np.empty(backend.bundle.manifest.model.vocab_size, np.float32)
        binding = self._binding
        binding.bind_input(graph.INPUTS_EMBEDS, "cpu", 0, self._element, embeds.shape, embeds.ctypes.data)
        binding.bind_cpu_input(graph.VISUAL_MASK, np.ascontiguousarray(visual_mask[None]))
        binding.bind_cpu_input(graph.POSITION_IDS, positions[None])
        binding.bind_cpu_input(graph.WRITE_INDICES, positions[:1])
        binding.bind_output(graph.LOGITS, "cpu", 0, np.float32, (1, logits.size), logits.ctypes.data)
        with as_backend_error(f"ONNX Runtime failed on tokens {start} to {start + len(embeds[0])}"):
            backend.decoder.run_with_iobinding(binding)
        return logits
