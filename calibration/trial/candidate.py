"""A quantized decoder that is tried before it is written: in memory, over the weights of the bundle it comes from."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.trial.backend import GraphBackend
from export.quantized.bundle import quantization
from export.quantized.parts import Part, parts, size
from export.quantized.plan import QuantizationPlan
from export.quantized.rewrite import rewrite
from export.quantized.weights import DecoderWeights
from runtime.bundle.manifest import CPU, FileRecord
from runtime.bundle.reader import Bundle
from runtime.model import Model


def candidate(bundle: Bundle, plan: QuantizationPlan, form: str, threads: int | None = None) -> Model:
    """The model that ``export.quantized.bundle.write_quantized`` would write: the same graphs, the same numbers.

    What is quantized, or smoothed, is in memory; all else is read from the bundle's file.

    Args:
        bundle: not quantized.
        plan: what to quantize.
        form: ``qdq`` or ``cpu``.
        threads: as the runtime takes them.
    """
    weights, decoder = _decoder(bundle, plan, form)
    stored = {tensor.name: tensor for tensor in weights.model.graph.initializer}
    contents = {name: content for part in decoder for name, content in part.contents.items()}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part in decoder:
        for tensor in part.model.graph.initializer:
            name = tensor.name
            if name not in contents:
                continue
            source = stored.get(name)
            if source is not None and source.data_type == tensor.data_type and not weights.is_smoothed(name):
                tensor.CopyFrom(source)
            elif name not in arrays:
                flat = np.concatenate([np.asarray(block).reshape(-1) for block in contents[name].blocks()])
                arrays[name] = flat.reshape(contents[name].shape)
    view = copy.copy(bundle)
    # As the manifest would be, as far as a backend reads it.
    view.manifest = replace(
        bundle.manifest,
        quantization=quantization(plan, form),
        files=bundle.manifest.files | {part.graph: FileRecord(0, "") for part in decoder},
    )
    graphs = {part.graph: part.model for part in decoder}
    return Model(view, GraphBackend(view, graphs, arrays, threads, prepacked=form == CPU))


def weights_size(bundle: Bundle, plan: QuantizationPlan, form: str) -> int:
    """Bytes that the weights of the quantized decoder take."""
    return size(_decoder(bundle, plan, form)[1])


def _decoder(bundle: Bundle, plan: QuantizationPlan, form: str) -> tuple[DecoderWeights, list[Part]]:
    weights = DecoderWeights(bundle, plan.smoothing)
    return weights, parts(rewrite(weights, plan, form), form, bundle.manifest.model, plan.caches)


def without(plan: QuantizationPlan, layers: Collection[int | None]) -> QuantizationPlan:
    """A plan that leaves some layers as they are, their smoothing and caches included; None is the head."""
    return QuantizationPlan(
        plan.mode,
        tuple(matrix for matrix in plan.matrices if layer_of(matrix.name) not in layers),
        tuple(item for item in plan.smoothing if item.layer not in layers),
        tuple(item for item in plan.caches if item.layer not in layers),
    )


def only(plan: QuantizationPlan, layer: int | None) -> QuantizationPlan:
    """A plan that quantizes one layer; None is the head."""
    return without(plan, layers_of(plan) - {layer})


def layers_of(plan: QuantizationPlan) -> set[int | None]:
    """The layers that a plan quantizes; None is the head."""
    return {layer_of(matrix.name) for matrix in plan.matrices} | {item.layer for item in plan.caches}


def layer_of(matrix: str) -> int | None:
    """The layer of a matrix, from its name; None for the head."""
    first, _, rest = matrix.partition(".")
    return int(rest.split(".")[0]) if first == "layers" else None
