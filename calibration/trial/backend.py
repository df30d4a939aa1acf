"""A backend that runs a changed decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend
from runtime.bundle.reader import Bundle
from runtime.errors import as_backend_error


class GraphBackend(OnnxRuntimeBackend):
    """ONNX Runtime over a bundle some of whose graphs are replaced by others, which lie in memory.

    Args:
        bundle: everything else, and the weights that the graphs point to.
        graphs: what to run, without weights, by the file that it stands for.
        weights: those that are not the bundle's, by name of the initializer.
        threads: as the runtime takes them.
        prepacked: let ONNX Runtime copy weights into a layout of its own, which ``MatMulNBits`` needs to be fast.

    Raises:
        BackendError: ONNX Runtime cannot run a graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Mapping[str, onnx.ModelProto],
        weights: Mapping[str, npt.NDArray[Any]],
        threads: int | None = None,
        prepacked: bool = False,
    ) -> None:
        self._graphs, self._prepacked = graphs, prepacked
        # ONNX Runtime computes with these very arrays.
        self._weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
        super().__init__(bundle, threads)

    def _open(self, graph: str) -> ort.InferenceSession:
        if graph not in self._graphs:
            return super()._open(graph)
        model = self._graphs[graph]
        options = self._options(self._prepacked)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.bundle.folder.resolve())
        )
        given = [tensor.name for tensor in model.graph.initializer if tensor.name in self._weights]
        if given:
            values = [ort.OrtValue.ortvalue_from_numpy(self._weights[name]) for name in given]
            options.add_external_initializers(given, values)
        with as_backend_error(f"ONNX Runtime cannot load the changed {graph}"):
            return ort.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
