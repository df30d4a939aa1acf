"""Plans that tests quantize with: scales come from the weights alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from export.quantized import quantize
from export.quantized.plan import MatrixPlan, QuantizationPlan
from export.quantized.weights import DecoderWeights


def absmax_plan(weights: DecoderWeights, matrices: Iterable[str]) -> QuantizationPlan:
    """Mode w8a16 for the named matrices: the largest magnitude of each row becomes the largest INT8 number."""
    plans = (
        MatrixPlan(name, np.concatenate([quantize.absmax_scale(block) for block in weights.blocks(name)]))
        for name in matrices
    )
    return QuantizationPlan("w8a16", tuple(plans))
