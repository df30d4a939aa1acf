"""Checks that a TensorRT plan belongs to a bundle, and finds how to call it. Nothing here needs TensorRT or a GPU."""

from __future__ import annotations

from runtime.backends import graph
from runtime.backends.tensorrt.plan import (
    NUMPY_TYPES,
    TYPES,
    Buffer,
    DecoderLayout,
    PlanInfo,
    Profile,
    Shape,
    TensorInfo,
    VisionLayout,
)
from runtime.bundle.manifest import ModelFacts
from runtime.images.preprocess import ImageProcessor


class PlanError(Exception):
    """A plan that cannot run the bundle. The message follows the plan's name: ``has no input x``."""


def decoder_layout(plan: PlanInfo, model: ModelFacts, precision: str) -> DecoderLayout:
    """Returns how to call a decoder plan.

    Raises:
        PlanError: it is of another model, or cannot compute one sequence token by token.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    updates = any(name.startswith(graph.UPDATE) for name in tensors)
    given = graph.UPDATE if updates else graph.PRESENT
    caches = tuple((graph.PAST + name, given + name) for name in graph.cache_names(model.num_hidden_layers))
    kind = TYPES[precision]
    wanted = {
        graph.INPUTS_EMBEDS: (True, kind, (-1, -1, model.hidden_size)),
        graph.VISUAL_MASK: (True, "BOOL", (-1, -1)),
        graph.POSITION_IDS: (True, "INT64", (-1, -1)),
        graph.WRITE_INDICES: (True, "INT64", (-1,)),
        graph.LOGITS: (False, "FLOAT", (-1, model.vocab_size)),
    }
    cache_shape = (-1, model.num_key_value_heads, -1, model.head_dim)
    for past, present in caches:
        wanted |= {past: (True, kind, cache_shape), present: (False, kind, cache_shape)}
    _require(tensors, wanted)
    capacities = {tensors[past].shape[2] for past, _ in caches}
    if len(capacities) != 1 or min(capacities) < 1:
        raise PlanError("has caches of no fixed capacity")
    (capacity,) = capacities
    for past, present in caches:
        if not updates and tensors[present].alias != past:
            raise PlanError(f"does not write {present} in the place of {past}")
    for low, high in ((range_.minimum[0], range_.maximum[0]) for tensor in plan.tensors for range_ in tensor.ranges):
        if not low <= 1 <= high:
            raise PlanError(f"computes {low} conversations at once, and the runtime computes one (--max-batch 1)")
    profiles = _profiles(tensors[graph.INPUTS_EMBEDS], axis=1, what="tokens")
    return DecoderLayout(
        capacity=capacity,
        profiles=profiles,
        hidden=model.hidden_size,
        cache=Buffer(NUMPY_TYPES[kind], (1, model.num_key_value_heads, capacity, model.head_dim)),
        caches=caches,
        updates=updates,
        logits=Buffer(NUMPY_TYPES["FLOAT"], (1, model.vocab_size)),
    )


def vision_layout(plan: PlanInfo, model: ModelFacts, image: ImageProcessor, precision: str) -> VisionLayout:
    """Returns how to call a vision plan.

    Raises:
        PlanError: it is of another model, or does not take a single tile.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    kind = TYPES[precision]
    tile = (3, image.image_size, image.image_size)
    tokens = (image.tokens_per_tile, model.hidden_size)
    _require(
        tensors, {graph.PIXEL_VALUES: (True, kind, (-1, *tile)), graph.VISUAL_EMBEDS: (False, kind, (-1, *tokens))}
    )
    profiles = _profiles(tensors[graph.PIXEL_VALUES], axis=0, what="tiles")
    return VisionLayout(profiles, Buffer(NUMPY_TYPES[kind], tile), Buffer(NUMPY_TYPES[kind], tokens))


def _require(tensors: dict[str, TensorInfo], wanted: dict[str, tuple[bool, str, Shape]]) -> None:
    for name, (is_input, kind, shape) in wanted.items():
        found = tensors.get(name)
        if found is None or found.is_input is not is_input:
            raise PlanError(f"has no {'input' if is_input else 'output'} {name}")
        if found.type != kind:
            raise PlanError(f"has {name} in {found.type}, the bundle in {kind}")
        if found.on_host:
            raise PlanError(f"wants {name} in host memory")
        # A size that is open on one side fits.
        if len(found.shape) != len(shape) or any(
            -1 not in sizes and sizes[0] != sizes[1] for sizes in zip(found.shape, shape, strict=True)
        ):
            raise PlanError(f"has {name} of shape {list(found.shape)}, the bundle {list(shape)}")
    for name in tensors:
        if name not in wanted:
            raise PlanError(f"has a tensor {name}, which the bundle's graph does not have")


def _profiles(tensor: TensorInfo, axis: int, what: str) -> tuple[Profile, ...]:
    """Returns profiles by size, which together take every number of rows from 1 up."""
    profiles = sorted(
        (Profile(index, range_.minimum[axis], range_.maximum[axis]) for index, range_ in enumerate(tensor.ranges)),
        key=lambda profile: profile.maximum,
    )
    covered = 0
    for profile in profiles:
        if profile.minimum > covered + 1:
            raise PlanError(f"has no profile for {covered + 1} {what}")
        covered = profile.maximum
    if not profiles:
        raise PlanError("has no optimization profile")
    return tuple(profiles)
