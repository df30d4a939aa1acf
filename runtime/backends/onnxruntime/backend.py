"""ONNX Runtime. The function bodies in the graphs are its implementation of the custom operators.

A bundle made for it has a decoder for each kind of tokens (``Manifest.by_expert``). A chunk then is computed in
stretches of one kind, on the same caches. That of visual tokens, and the vision graph, are opened by the first image.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from runtime.backends import Array, graph
from runtime.backends.checks import check_graph, link_advice
from runtime.bundle.manifest import CPU, DECODER_GRAPH, PRECISIONS, VISION_GRAPH, to_format
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError, as_backend_error
from runtime.packages import install_command

try:
    import onnxruntime as ort
except ImportError:
    raise BackendError(f"onnxruntime is not installed; this installs it: {install_command('onnxruntime')}") from None

# isort: split
# Without onnxruntime neither of it can be imported.
from runtime.backends.onnxruntime.context import TYPES, OnnxRuntimeContext

MINIMUM_VERSIONS = {20: (1, 17), 24: (1, 25)}
"""By the opset of a bundle, the first release with CPU kernels for it: 1.24 parses TensorScatter and has none."""

INT8_CACHES_VERSION = (1, 27)
"""The first release whose CPU kernel of GroupQueryAttention takes INT8 caches: 1.26 opens the graph, then fails."""

CHUNK = 512
"""Tokens of a prompt that are computed at a time. It bounds the memory of long prompts: attention scores and expert
activations grow with it."""


class OnnxRuntimeBackend:
    """The graphs of a bundle on ONNX Runtime, by its CPU provider unless a subclass says otherwise.

    Args:
        bundle: what to run; fp32 or fp16.
        threads: threads to compute with; None for ONNX Runtime's choice, one a physical core.
        graphs: graphs that run in place of the bundle's, by the name of the file.
        observer: called after each run of a decoder.

    Raises:
        BackendError: the bundle's number format has no kernels on a CPU, or ONNX Runtime is too old.
    """

    provider, device = "CPUExecutionProvider", "cpu"

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
        self.length_limit, self.dtype = bundle.length_limit, PRECISIONS[bundle.manifest.precision]
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
                return ort.InferenceSession(path, options, providers=[self.provider], enable_fallback=0)
            model, weights = self._graphs[graph].model, self._graphs[graph].weights
            folder = str(self.bundle.folder.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers(list(weights), values)
            return ort.InferenceSession(model, options, providers=[self.provider], enable_fallback=0)

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
        vision, facts = self.graph(VISION_GRAPH), self.bundle.manifest
        binding, (_, element) = vision.io_binding(), TYPES[vision.get_inputs()[0].type]
        embeds = np.empty((len(pixel_values), facts.image.tokens_per_tile, facts.model.hidden_size), self.dtype)
        pixels = np.empty((1, *pixel_values.shape[1:]), self.dtype)
        binding.bind_input(graph.PIXEL_VALUES, "cpu", 0, element, pixels.shape, pixels.ctypes.data)
        for tile, target in zip(pixel_values, embeds, strict=True):
            to_format(tile, pixels[0])
            binding.bind_output(graph.VISUAL_EMBEDS, "cpu", 0, element, (1, *target.shape), target.ctypes.data)
            with as_backend_error("ONNX Runtime failed on the image"):
                vision.run_with_iobinding(binding)
        return embeds.reshape(-1, embeds.shape[-1])

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
