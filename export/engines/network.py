"""A bundle's graphs as TensorRT wants them: caches of fixed capacity, and shapes for each optimization profile.

Nothing here needs TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import onnx

from runtime.errors import BundleError, OptionError

CAPACITY = "capacity"
"""The symbolic dimension of the caches in exported graphs: tokens that a cache holds."""


class Range(NamedTuple):
    """Sizes that a symbolic dimension has in one profile; TensorRT tunes for the optimum."""

    minimum: int
    optimum: int
    maximum: int

    @classmethod
    def only(cls, size: int) -> Range:
        """Returns the range of one size."""
        return cls(size, size, size)


class InputShapes(NamedTuple):
    """Shapes of one input in one profile."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


def fix_dimension(model: onnx.ModelProto, name: str, size: int) -> None:
    """Replaces a symbolic dimension of a graph by a number, in place.

    TensorRT refuses caches of open capacity ("The KV cache tensor must have a static sequence length dimension").
    Shapes of values inside the graph are dropped, since they may be expressions in the old name; parsers infer them.

    Raises:
        OptionError: the size is not positive.
        BundleError: no input has such a dimension.
    """
    if size < 1:
        raise OptionError(f"{name} must be 1 or more, got {size}")
    values = (*model.graph.input, *model.graph.output)
    found = [item for value in values for item in value.type.tensor_type.shape.dim if item.dim_param == name]
    if not found:
        raise BundleError(f'the graph "{model.graph.name}" has no dimension "{name}": export the bundle again')
    for dimension in found:
        dimension.dim_value = size
    del model.graph.value_info[:]


def decoder_profiles(capacity: int, chunk: int, batch: int = 1) -> tuple[dict[str, Range], dict[str, Range]]:
    """Returns the two profiles of a decoder: prefill of up to ``chunk`` tokens at once, and decode of one.

    TensorRT tunes each profile for its optimum, and kernels that are fast for one row are slow for a thousand.

    Raises:
        OptionError: the chunk does not fit the cache.
    """
    if not 1 <= chunk <= capacity:
        raise OptionError(f"a prefill chunk must be from 1 to the cache's capacity of {capacity} tokens, got {chunk}")
    if batch < 1:
        raise OptionError(f"batch must be 1 or more, got {batch}")
    rows = Range.only(batch)
    return {"batch": rows, "sequence": Range(1, chunk, chunk)}, {"batch": rows, "sequence": Range.only(1)}


def vision_profile(most_tiles: int) -> dict[str, Range]:
    """Returns the profile of the vision graph: from one tile to as many as the image processor makes.

    Raises:
        OptionError: fewer than one tile.
    """
    if most_tiles < 1:
        raise OptionError(f"tiles must be 1 or more, got {most_tiles}")
    return {"tiles": Range(1, most_tiles, most_tiles)}


def input_shapes(model: onnx.ModelProto, profile: Mapping[str, Range]) -> dict[str, InputShapes]:
    """Returns the shapes of all inputs of a graph in one profile, by name, in graph order.

    Raises:
        BundleError: the graph has a symbolic dimension that the profile does not give.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    return {
        value.name: InputShapes(*zip(*_ranges(value, profile), strict=True))
        for value in model.graph.input
        if value.name not in weights
    }


def _ranges(value: onnx.ValueInfoProto, profile: Mapping[str, Range]) -> Iterator[Range]:
    for dimension in value.type.tensor_type.shape.dim:
        if not dimension.dim_param:
            yield Range.only(dimension.dim_value)
        elif dimension.dim_param in profile:
            yield profile[dimension.dim_param]
        else:
            raise BundleError(
                f'input "{value.name}" has a dimension "{dimension.dim_param}", and the profile gives '
                f"{', '.join(profile)}: export the bundle again"
            )
