"""ONNX Runtime on a GPU, by its CUDA provider. A graph is refused if a part of it would be computed elsewhere."""

from __future__ import annotations

from runtime.backends import graph
from runtime.backends.checks import link_advice
from runtime.backends.cuda.device import require_no_threads
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError, as_backend_error

# isort: split
# After our own modules, which say how to install it.
import onnxruntime as ort

SHAPE_OPERATORS = frozenset({"Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Range"})
"""Operators that may run on the CPU, where ONNX Runtime computes shapes on purpose."""


class CudaProviderBackend(OnnxRuntimeBackend):
    """The graphs of a bundle on ONNX Runtime's CUDA provider.

    Args:
        bundle: what to run, of opset 24.
        threads: must be None.

    Raises:
        OptionError: ``threads`` was given.
        BackendError: the provider is missing, cannot be used, or does not compute all of a graph.
    """

    provider, device = "CUDAExecutionProvider", "cuda"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        require_no_threads("onnxruntime-cuda", threads)
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
        with as_backend_error(f"ONNX Runtime cannot load {path}{link_advice(self.bundle, name)}"):
            session = ort.InferenceSession(path, options, providers=[self.provider], enable_fallback=0)
        if self.provider not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime cannot use its {self.provider}: install the CUDA and cuDNN that "
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
