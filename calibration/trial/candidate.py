"""A quantized decoder in memory, to be measured before it is written."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from export.quantized.plan import QuantizationPlan
from export.quantized.rewrite import decoder_files
from export.quantized.weights import DecoderWeights
from runtime.backends.graph import GraphInMemory
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import FileRecord
from runtime.model import Model


def candidate(plain: DecoderWeights, plan: QuantizationPlan, form: str, threads: int | None = None) -> Model:
    """Makes the model that ``export.quantized.bundle.write_quantized`` would write: same graphs, same numbers.

    Quantized and smoothed weights are in memory. All others are read from the bundle's file.

    Args:
        plain: the decoder's weights, not smoothed.
        plan: what to quantize.
        form: ``qdq`` or ``cpu``.
        threads: CPU threads to compute with; None for ONNX Runtime's choice.
    """
    bundle, weights = plain.bundle, plain.smoothed(plan.smoothing)
    files = decoder_files(weights, plan, form, bundle.manifest.model)
    stored = {tensor.name: tensor for tensor in weights.model.graph.initializer}
    sources = {name: source for file in files for name, source in file.tensors.items()}
    arrays: dict[str, npt.NDArray[Any]] = {}
    graphs = {}
    for file in files:
        given = {}
        for tensor in file.model.graph.initializer:
            name = tensor.name
            if name not in sources:
                continue
            source = stored.get(name)
            if source is not None and source.data_type == tensor.data_type and not weights.is_smoothed(name):
                tensor.CopyFrom(source)
                continue
            if name not in arrays:
                flat = np.concatenate([np.asarray(block).reshape(-1) for block in sources[name].blocks()])
                arrays[name] = np.ascontiguousarray(flat.reshape(sources[name].shape))
            given[name] = arrays[name]
        graphs[file.name] = GraphInMemory(file.model.SerializeToString(), given)
    view = copy.copy(bundle)
    # As the manifest would be, as far as a backend reads it.
    view.manifest = replace(
        bundle.manifest,
        quantization=plan.manifest_entry(form),
        files=bundle.manifest.files | {file.name: FileRecord(0, "") for file in files},
    )
    return Model(view, OnnxRuntimeBackend(view, threads, graphs))


def without(plan: QuantizationPlan, layers: Collection[int | None]) -> QuantizationPlan:
    """Returns the plan without some layers, their smoothing and caches included; None is the head."""
    return QuantizationPlan(
        plan.mode,
        tuple(matrix for matrix in plan.matrices if layer_of(matrix.name) not in layers),
        tuple(item for item in plan.smoothing if item.layer not in layers),
        tuple(item for item in plan.caches if item.layer not in layers),
    )


def only(plan: QuantizationPlan, layer: int | None) -> QuantizationPlan:
    """Returns the plan of one layer alone; None is the head."""
    return without(plan, layers_of(plan) - {layer})


def layers_of(plan: QuantizationPlan) -> set[int | None]:
    """Returns the layers that a plan quantizes; None is the head."""
    return {layer_of(matrix.name) for matrix in plan.matrices} | {item.layer for item in plan.caches}


def layer_of(matrix: str) -> int | None:
    """Returns the layer of a matrix, from its name; None for the head."""
    first, _, rest = matrix.partition(".")
    return int(rest.split(".")[0]) if first == "layers" else None
