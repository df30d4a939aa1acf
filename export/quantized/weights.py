"""The weights of a decoder that is to be quantized, read block by block, and smoothed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from export.errors import QuantizationError
from export.external_data import BLOCK_BYTES, TensorSource
from export.passes.nodes import load_graph
from export.quantized.plan import Smoothing, Vector
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError

W = TypeVar("W", bound="Weights")


@dataclass(frozen=True)
class _Factors:
    """What smoothing does to one tensor [rows, columns]; ``times`` are of columns, and a vector counts as one row."""

    times: Vector | None = None
    over_columns: Vector | None = None
    over_rows: Vector | None = None


class Weights:
    """The weights of a decoder that is not quantized. At most a block of a tensor is in memory.

    Args:
        model: the graph, whose initializers have no data.
        tensors: what the initializers hold.

    Raises:
        QuantizationError: methods raise it for a name that is not there.
    """

    def __init__(self, model: onnx.ModelProto, tensors: Mapping[str, TensorSource]) -> None:
        self.model, self._tensors = model, tensors
        self._factors: dict[str, _Factors] = {}

    def smoothed(self: W, smoothing: Iterable[Smoothing]) -> W:
        """Returns the same weights, read with these factors instead. The graph is not parsed again.

        Raises:
            QuantizationError: factors do not fit.
        """
        other = copy.copy(self)
        other._factors = self._factors_of(smoothing)
        return other

    def source(self, name: str) -> TensorSource:
        """Returns an initializer as it is stored, never smoothed."""
        if name not in self._tensors:
            raise QuantizationError(f"the decoder has no weight {name!r}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an initializer."""
        return self.source(name).shape

    def is_smoothed(self, name: str) -> bool:
        """Returns whether smoothing changes an initializer."""
        return name in self._factors

    def stored(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yields the rows of an initializer in blocks, in its own number format, never smoothed."""
        return iter(self.source(name).blocks())

    def blocks(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """Yields the rows of an initializer in blocks, in float32, smoothed."""
        factors, start = self._factors.get(name, _Factors()), 0
        for stored in self.stored(name):
            # A copy: blocks as they are stored may be somebody else's.
            values = stored.astype(np.float32)
            if factors.times is not None:
                values *= factors.times
            if factors.over_columns is not None:
                values /= factors.over_columns
            if factors.over_rows is not None:
                values /= factors.over_rows[start : start + len(values), None]
            start += len(values)
            yield values

    def _factors_of(self, smoothing: Iterable[Smoothing]) -> dict[str, _Factors]:
        factors: dict[str, _Factors] = {}
        for item in smoothing:
            layer = f"layers.{item.layer}"
            if f"{layer}.ffn_norm.weight" in factors or f"{layer}.feed_forward.text_down" in factors:
                raise QuantizationError(f"{layer} is smoothed twice")
            if item.gate_up is not None:
                norm = f"{layer}.ffn_norm.weight"
                factors[norm] = _Factors(over_columns=self._factor(item.gate_up, norm))
            for expert, down in (("text", item.down), ("visual", item.visual_down)):
                gate_up_name, down_name = (f"{layer}.feed_forward.{expert}_{name}" for name in ("gate_up", "down"))
                over_rows = None
                if down is not None:
                    factors[down_name] = _Factors(times=self._factor(down, down_name))
                    over_rows = np.concatenate([np.ones_like(down), down])
                if item.gate_up is not None or down is not None:
                    factors[gate_up_name] = _Factors(times=item.gate_up, over_rows=over_rows)
        return factors

    def _factor(self, factor: Vector, name: str) -> Vector:
        columns = self.shape(name)[-1]
        if factor.shape != (columns,) or not (np.isfinite(factor) & (factor > 0)).all():
            raise QuantizationError(
                f"smoothing of {name} should be {columns} positive numbers, got {factor.shape} from {factor.min()}"
            )
        return factor.astype(np.float32, copy=False)


class DecoderWeights(Weights):
    """The weights of ``decoder.onnx`` of a bundle that is not quantized; the graph is parsed here and not again.

    Raises:
        BundleError: the graph cannot be read, or the bundle does not have its data.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        model, tensors = load_graph(bundle, DECODER_GRAPH), {}
        for tensor in filter(uses_external_data, model.graph.initializer):
            place = ExternalDataInfo(tensor)
            if place.location not in bundle.manifest.files:
                graph = bundle.path(DECODER_GRAPH)
                raise BundleError(f"{graph}: {tensor.name} has no data in the bundle: export the bundle again")
            tensors[tensor.name] = _in_file(tensor, bundle.path(place.location), place.offset or 0)
        super().__init__(model, tensors)


def _in_file(tensor: onnx.TensorProto, file: Path, offset: int) -> TensorSource:
    shape, dtype = tuple(tensor.dims), np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    rows, columns = shape if len(shape) == 2 else (1, int(np.prod(shape)))

    def blocks() -> Iterator[npt.NDArray[Any]]:
        step = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            count = min(step, rows - start) * columns
            values = np.fromfile(file, dtype, count, offset=offset + start * columns * dtype.itemsize)
            yield values.reshape(-1, *shape[1:])

    return TensorSource(dtype, shape, blocks)
