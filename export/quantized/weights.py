"""The weights of a bundle's decoder, read block by block, smoothed if wanted. No more than a block is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from export.errors import QuantizationError
from export.quantized.plan import Smoothing, Vector
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle

BLOCK_BYTES = 32 << 20
"""How much of a tensor is in memory at a time, counted in float32."""


class Weights(Protocol):
    """Where the matrices of a decoder come from: a bundle, or a checkpoint."""

    @property
    def model(self) -> onnx.ModelProto:
        """The decoder, not quantized, its initializers without data."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an initializer."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """The number format that an initializer has in ``model``."""

    def is_smoothed(self, name: str) -> bool:
        """Whether values are read otherwise than they are stored."""

    def stored(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """An initializer in consecutive blocks of rows, in its own number format, never smoothed."""

    def blocks(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """The same in float32, smoothed."""


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Factors:
    """What smoothing does to one tensor [rows, columns]; a vector counts as one row."""

    times: Vector | None = None
    """[columns]"""
    over_columns: Vector | None = None
    """[columns]"""
    over_rows: Vector | None = None
    """[rows]"""


class DecoderWeights:
    """Reads the initializers of ``decoder.onnx``.

    Args:
        bundle: not quantized.
        smoothing: factors that the values are read with.

    Raises:
        QuantizationError: the graph cannot be read, or factors that do not fit it. Methods raise it for a name that is
            not there.
    """

    def __init__(self, bundle: Bundle, smoothing: Iterable[Smoothing] = ()) -> None:
        path = bundle.path(DECODER_GRAPH)
        try:
            self.model = onnx.load(path, load_external_data=False)
        except Exception as error:
            # Protobuf has errors of its own, which differ between its versions.
            raise QuantizationError(f"{path} cannot be read ({error}): export the bundle again") from None
        self._places: dict[str, _Place] = {}
        for tensor in self.model.graph.initializer:
            data = {entry.key: entry.value for entry in tensor.external_data}
            if not data:
                continue
            if data["location"] not in bundle.manifest.files:
                raise QuantizationError(f"{path}: {tensor.name} has no data in the bundle: export the bundle again")
            self._places[tensor.name] = _Place(
                bundle.path(data["location"]),
                int(data.get("offset", 0)),
                tuple(tensor.dims),
                np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)),
            )
        self._factors = self._factors_of(smoothing)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an initializer."""
        return self._place(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The number format that an initializer is stored in."""
        return self._place(name).dtype

    def is_smoothed(self, name: str) -> bool:
        """Whether values are read otherwise than they are stored."""
        return name in self._factors

    def stored(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """The rows of an initializer in blocks, in its own number format, never smoothed."""
        place = self._place(name)
        shape = place.shape
        rows, columns = shape if len(shape) == 2 else (1, int(np.prod(shape)))
        step = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            count = min(step, rows - start) * columns
            offset = place.offset + start * columns * place.dtype.itemsize
            values = np.fromfile(place.file, place.dtype, count, offset=offset)
            yield values.reshape(-1, *shape[1:])

    def blocks(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """The rows of an initializer in blocks, in float32, smoothed."""
        factors, start = self._factors.get(name, _Factors()), 0
        for stored in self.stored(name):
            values = stored.astype(np.float32)
            if factors.times is not None:
                values *= factors.times
            if factors.over_columns is not None:
                values /= factors.over_columns
            if factors.over_rows is not None:
                values /= factors.over_rows[start : start + len(values), None]
            start += len(values)
            yield values

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise QuantizationError(f"the decoder has no weight {name!r}")
        return self._places[name]

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
