"""The decoder of a bundle for ONNX Runtime on a CPU, straight from a checkpoint: no float decoder on the disk between.

``export.quantized.parts`` has the graphs, ``export.quantized.rewrite`` the numbers; here is where the weights come
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from export.checkpoint.reader import Checkpoint
from export.cpu_target import FP32, INT4
from export.model.trace import Graph
from export.model.weights import blocks_by_name
from export.quantized.bundle import quantization
from export.quantized.parts import Part, parts
from export.quantized.plan import MatrixPlan, QuantizationPlan
from export.quantized.quantizable import Matrix, find_matrices
from export.quantized.rewrite import rewrite
from runtime.bundle.manifest import CPU, MODES, W4A16, ModelFacts, Quantization


@dataclass(frozen=True)
class CpuDecoder:
    """The graphs, and what a manifest says of their matrices."""

    parts: list[Part]
    quantization: Quantization | None


def cpu_decoder(graph: Graph, checkpoint: Checkpoint, facts: ModelFacts, weights: str) -> CpuDecoder:
    """The decoder of a checkpoint in form ``cpu``.

    Args:
        graph: the decoder as it is traced, in fp32.
        checkpoint: where its weights are.
        facts: of the model; ``max_length`` is that of the rotary tables.
        weights: one of ``export.cpu_target.CPU_WEIGHTS``. Scales come from the weights alone, one a block.
    """
    source = _CheckpointWeights(graph, checkpoint, facts.max_length)
    matrices = [] if weights == FP32 else find_matrices(graph.model)
    plan = QuantizationPlan(
        W4A16 if weights == INT4 else MODES[0],
        tuple(MatrixPlan(matrix.name, None, bits=_bits(matrix, weights)) for matrix in matrices),
    )
    decoder = parts(rewrite(source, plan, CPU), CPU, facts)
    return CpuDecoder(decoder, quantization(plan, CPU) if plan.matrices else None)


def _bits(matrix: Matrix, weights: str) -> int:
    return 4 if weights == INT4 and matrix.part == "feed_forward" else 8


class _CheckpointWeights:
    """The tensors of a checkpoint by the names of the traced graph, as ``export.quantized.weights.Weights``."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, max_length: int) -> None:
        self.model: onnx.ModelProto = graph.model
        self._shapes = {slot.name: slot.shape for slot in graph.slots}
        self._blocks = blocks_by_name(checkpoint, max_length, torch.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype("<f4")

    def is_smoothed(self, name: str) -> bool:
        return False

    def stored(self, name: str) -> Iterator[npt.NDArray[Any]]:
        return self.blocks(name)

    def blocks(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        for block in self._blocks(name):
            yield block.reshape(-1, *self._shapes[name][1:]).numpy()
