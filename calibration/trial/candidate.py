"""A quantized decoder that is tried before it is written: in memory, over the weights of the bundle it comes from."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.trial.backend import GraphBackend
from export import external_data
from export.external_data import GraphFile
from export.quantized.plan import QuantizationPlan
from export.quantized.rewrite import decoder_files
from export.quantized.weights import DecoderWeights, Weights
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
    weights, files = _decoder(bundle, plan, form)
    stored = {tensor.name: tensor for tensor in weights.model.graph.initializer}
    sources = {name: source for file in files for name, source in file.tensors.items()}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for file in files:
        for tensor in file.model.graph.initializer:
            name = tensor.name
            if name not in sources:
                continue
            given = stored.get(name)
            if given is not None and given.data_type == tensor.data_type and not weights.is_smoothed(name):
                tensor.CopyFrom(given)
            elif name not in arrays:
                flat = np.concatenate([np.asarray(block).reshape(-1) for block in sources[name].blocks()])
                arrays[name] = flat.reshape(sources[name].shape)
    view = copy.copy(bundle)
    # As the manifest would be, as far as a backend reads it.
    view.manifest = replace(
        bundle.manifest,
        quantization=plan.manifest_entry(form),
        files=bundle.manifest.files | {file.name: FileRecord(0, "") for file in files},
    )
    graphs = {file.name: file.model for file in files}
    return Model(view, GraphBackend(view, graphs, arrays, threads, prepacked=form == CPU))


def weights_size(bundle: Bundle, plan: QuantizationPlan, form: str) -> int:
    """Bytes that the weights of the quantized decoder take."""
    return external_data.weights_size(_decoder(bundle, plan, form)[1])


def _decoder(bundle: Bundle, plan: QuantizationPlan, form: str) -> tuple[Weights, list[GraphFile]]:
    weights = DecoderWeights(bundle, plan.smoothing)
    return weights, decoder_files(weights, plan, form, bundle.manifest.model)


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
