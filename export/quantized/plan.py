"""What is to be stored in integers, and with which scales.

``export.quantized.bundle.write_quantized`` writes a bundle that follows a plan. Scales may come from observed
activations, or from the weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.passes.int8_caches import CachePlan
from plugins_trt.schema import EXPERTS
from runtime.bundle.manifest import Quantization

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MatrixPlan:
    """How one matrix of the decoder is stored in integers.

    Attributes:
        name: its initializer in ``decoder.onnx``, as ``layers.0.feed_forward.text_gate_up``.
        scale: float32 [out], positive: row i is stored as INT8 numbers times ``scale[i]``. It is that of the matrix
            after smoothing. None, in form ``cpu`` alone: each block of a row has a scale of its own, as
            ``export.quantized.quantize`` chooses it.
        input_scale: the activations in front of the matrix are INT8 numbers times this (w8a8); None for w8a16.
        bits: 8; or 4, in form ``cpu`` and without ``scale``.
    """

    name: str
    scale: Vector | None
    input_scale: float | None = None
    bits: int = 8


@dataclass(frozen=True)
class Smoothing:
    """Factors moved from activations into weights of one layer's experts: x / s and W · s, so that nothing changes.

    Attributes:
        layer: index of the layer.
        gate_up: float32 [hidden] or None. The weight of ``ffn_norm`` is divided by it; columns of the text *and* the
            visual expert's gate and up, which share that norm, are multiplied.
        down: float32 [inter] or None. Rows of the text expert's up are divided by it; columns of its down multiplied.
        visual_down: the same for the visual expert.
    """

    layer: int
    gate_up: Vector | None = None
    down: Vector | None = None
    visual_down: Vector | None = None


@dataclass(frozen=True)
class QuantizationPlan:
    """Everything that distinguishes a quantized bundle from its source.

    Matrices and caches that are not named stay as they are. An expert's gate_up and down are named together, or
    neither.

    Attributes:
        mode: one of ``runtime.bundle.manifest.MODES``, or ``W4A16``; with ``w8a8`` every matrix has an
            ``input_scale``, otherwise none.
        matrices: in any order.
        smoothing: at most one a layer.
        caches: at most one a layer.
    """

    mode: str
    matrices: tuple[MatrixPlan, ...]
    smoothing: tuple[Smoothing, ...] = ()
    caches: tuple[CachePlan, ...] = ()

    def manifest_entry(self, form: str) -> Quantization | None:
        """Returns what a bundle's manifest says of the plan; None where nothing is quantized."""
        if not self.matrices and not self.caches:
            return None
        names = [matrix.name for matrix in self.matrices]
        return Quantization(
            mode=self.mode,
            form=form,
            experts=tuple(e for e in EXPERTS if any(f".feed_forward.{e}_" in name for name in names)),
            attention=any(".attention." in name for name in names),
            lm_head="lm_head.weight" in names,
            kv_cache=bool(self.caches),
        )
