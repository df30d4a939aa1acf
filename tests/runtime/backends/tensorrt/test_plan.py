"""What is read of a plan: of networks that TensorRT for RTX parses, and everything that is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.engines.options import Options
from export.engines.plan import PREFILL_CHUNK, Plan, plans
from runtime.backends import graph
from runtime.backends.tensorrt.check import PlanError, decoder_layout, vision_layout
from runtime.backends.tensorrt.plan import ALIGNMENT, Buffer, PlanInfo, Profile, ShapeRange, TensorInfo, place
from runtime.bundle.manifest import Manifest
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS

from .host_device import plan_info

ROOT = Path(__file__).resolve().parents[4]
LENGTH = 2048


@pytest.fixture(scope="module")
def ask_rtx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Asks ``rtx_network.py``, in a process that finds TensorRT's library by the name that its parser looks for."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    folder = tmp_path_factory.mktemp("rtx")
    (folder / "libtensorrt_rtx.so").symlink_to(Path(spec.submodule_search_locations[0]) / "libtensorrt_rtx.so.1")

    def ask(job: dict[str, Any], model: bytes = b"") -> Any:
        result = subprocess.run(
            [sys.executable, ROOT / "tests/runtime/backends/tensorrt/rtx_network.py"],
            input=json.dumps(job).encode() + b"\n" + model,
            capture_output=True,
            check=False,
            env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)},
        )
        assert result.returncode == 0, result.stderr.decode()
        return json.loads(result.stdout)

    return ask


def read_by_rtx(ask: Callable[..., Any], bundle: Bundle, plan: Plan, library: Path) -> PlanInfo:
    job = {"plugin": str(library), "graph": str(bundle.path(plan.graph)), "profiles": plan.profiles}
    answer = ask(job, plan.model.SerializeToString())

    def tensor(values: dict[str, Any]) -> TensorInfo:
        ranges = tuple(ShapeRange(*(tuple(shape) for shape in range_.values())) for range_ in values["ranges"])
        return TensorInfo(**{**values, "shape": tuple(values["shape"]), "ranges": ranges})

    return PlanInfo(tuple(map(tensor, answer["tensors"])), answer["scratch"])


# What TensorRT says of the bundles' plans -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(
    ask_rtx: Callable[..., Any], bf16_bundle: Path, library: Path
) -> tuple[Manifest, PlanInfo, PlanInfo, tuple[Plan, Plan]]:
    bundle = Bundle(bf16_bundle)
    built = plans(bundle, Options(TARGETS["trt-rtx"], 89, LENGTH, 1))
    decoder, vision = (read_by_rtx(ask_rtx, bundle, plan, library) for plan in built)
    return bundle.manifest, decoder, vision, built


def test_decoder_of_a_parsed_network(networks: tuple[Manifest, PlanInfo, PlanInfo, Any]) -> None:
    manifest, decoder, _, _ = networks
    facts = manifest.model
    layout = decoder_layout(decoder, facts, "bf16")
    assert (layout.capacity, layout.chunk, layout.updates) == (LENGTH, PREFILL_CHUNK, False)
    assert layout.profiles == (Profile(1, 1, 1), Profile(0, 1, PREFILL_CHUNK))
    assert [layout.profile(tokens).index for tokens in (1, 2, PREFILL_CHUNK)] == [1, 0, 0]
    assert layout.inputs(1)[graph.INPUTS_EMBEDS].dtype == np.uint16
    assert layout.cache.nbytes == facts.num_key_value_heads * LENGTH * facts.head_dim * 2
    assert layout.logits == Buffer(np.dtype(np.float32), (1, facts.vocab_size))
    assert layout.caches[3] == ("past_key_values.1.value", "present.1.value")
    assert len(layout.caches) == 2 * facts.num_hidden_layers
    # All inputs get a shape, and nothing else does.
    assert set(layout.shapes(7)) == {tensor.name for tensor in decoder.tensors if tensor.is_input}
    assert layout.shapes(7)["inputs_embeds"] == (1, 7, facts.hidden_size)


def test_vision_of_a_parsed_network(networks: tuple[Manifest, PlanInfo, PlanInfo, Any]) -> None:
    manifest, _, vision, _ = networks
    layout = vision_layout(vision, manifest.model, manifest.image, "bf16")
    assert layout.profiles == (Profile(0, 1, 13),)
    assert (layout.tile.shape, layout.tile.dtype) == ((3, 448, 448), np.uint16)
    assert layout.tokens.shape == (256, manifest.model.hidden_size)


def test_the_stand_in_of_the_other_tests_says_the_same(networks: tuple[Any, PlanInfo, PlanInfo, Any]) -> None:
    """They read the graph instead of asking TensorRT."""
    _, decoder, vision, built = networks
    for info, plan in zip((decoder, vision), built, strict=True):
        assert set(info.tensors) == set(plan_info(plan, 0).tensors)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tiny_v1_bundle: Path) -> tuple[Manifest, PlanInfo, PlanInfo]:
    bundle = Bundle(tiny_v1_bundle)
    built = plans(bundle, Options(TARGETS["trt"], 89, LENGTH, 1))
    return bundle.manifest, *(plan_info(plan, 0) for plan in built)


def changed(plan: PlanInfo, name: str, /, **values: Any) -> PlanInfo:
    """A plan one tensor of which is otherwise; without values it is not there."""
    assert any(tensor.name == name for tensor in plan.tensors)
    tensors = (replace(tensor, **values) if tensor.name == name else tensor for tensor in plan.tensors)
    return replace(plan, tensors=tuple(tensor for tensor in tensors if values or tensor.name != name))


def tokens(*ranges: tuple[int, int]) -> tuple[ShapeRange, ...]:
    return tuple(ShapeRange((1, low, 128), (1, high, 128), (1, high, 128)) for low, high in ranges)


def batch(size: int) -> tuple[ShapeRange, ...]:
    return (ShapeRange((size, 1), (size, 1), (size, 1)),)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no input": ("visual_mask", {}, "has no input visual_mask"),
    "no cache": ("past_key_values.3.value", {}, "has no input past_key_values.3.value"),
    "no output": ("logits", {}, "has no output logits"),
    "an input that is an output": ("position_ids", {"is_input": False}, "has no input position_ids"),
    "another type": ("inputs_embeds", {"type": "HALF"}, "has inputs_embeds in HALF, the bundle in FLOAT"),
    "old integers": ("position_ids", {"type": "INT32"}, "has position_ids in INT32, the bundle in INT64"),
    "another size": ("logits", {"shape": (-1, 7)}, "has logits of shape [-1, 7], the bundle [-1, 777]"),
    "another rank": ("visual_mask", {"shape": (-1,)}, "has visual_mask of shape [-1], the bundle [-1, -1]"),
    "on the host": ("write_indices", {"on_host": True}, "wants write_indices in host memory"),
    "a name of no graph": ("logits", {"name": "scores"}, "has no output logits"),
    "not in place": (
        "present.0.key",
        {"alias": None},
        "does not write present.0.key in the place of past_key_values.0",
    ),
    "in another place": ("present.0.key", {"alias": "past_key_values.0.value"}, "does not write present.0.key in the"),
    "an open cache": ("past_key_values.0.key", {"shape": (-1, 2, -1, 32)}, "has caches of no fixed capacity"),
    "unequal caches": ("past_key_values.0.key", {"shape": (-1, 2, 64, 32)}, "has caches of no fixed capacity"),
    "a batch": ("visual_mask", {"ranges": batch(4)}, "computes 4 conversations at once, and the runtime computes one"),
    "no profile": ("inputs_embeds", {"ranges": ()}, "has no optimization profile"),
    "no decode": ("inputs_embeds", {"ranges": tokens((2, 64))}, "has no profile for 1 tokens"),
    "a gap": ("inputs_embeds", {"ranges": tokens((8, 64), (1, 4))}, "has no profile for 5 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_decoder(good: tuple[Manifest, PlanInfo, PlanInfo], name: str) -> None:
    manifest, decoder, _ = good
    tensor, change, words = REFUSED[name]
    with pytest.raises(PlanError) as caught:
        decoder_layout(changed(decoder, tensor, **change), manifest.model, "fp32")
    assert str(caught.value).startswith(words)


def test_refused_extra_tensor(good: tuple[Manifest, PlanInfo, PlanInfo]) -> None:
    manifest, decoder, _ = good
    more = replace(decoder, tensors=(*decoder.tensors, TensorInfo("lora", True, "FLOAT", (1,))))
    with pytest.raises(PlanError, match="has a tensor lora, which the bundle's graph does not have"):
        decoder_layout(more, manifest.model, "fp32")


def test_refused_vision(good: tuple[Manifest, PlanInfo, PlanInfo]) -> None:
    manifest, decoder, vision = good
    for plan, words in (
        (decoder, "has no input pixel_values"),
        (changed(vision, "pixel_values", shape=(-1, 3, 224, 224)), r"has pixel_values of shape \[-1, 3, 224, 224\]"),
        (changed(vision, "visual_embeds", shape=(-1, 64, 128)), r"has visual_embeds of shape \[-1, 64, 128\]"),
    ):
        with pytest.raises(PlanError, match=words):
            vision_layout(plan, manifest.model, manifest.image, "fp32")
    with pytest.raises(PlanError, match="has pixel_values in FLOAT, the bundle in BF16"):
        vision_layout(vision, manifest.model, manifest.image, "bf16")


# What follows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "chunk", "chosen"),
    [
        (((1, 64), (1, 1)), 64, {1: 1, 2: 0, 64: 0}),
        (((1, 1), (1, 64)), 64, {1: 0, 2: 1, 64: 1}),
        (((1, 64),), 64, {1: 0, 64: 0}),
        (((1, 256), (1, 16), (1, 1)), 256, {1: 2, 2: 1, 16: 1, 17: 0}),
        (((2, 256), (1, 1)), 256, {1: 1, 2: 0}),
    ],
)
def test_profiles(
    good: tuple[Manifest, PlanInfo, PlanInfo],
    ranges: tuple[tuple[int, int], ...],
    chunk: int,
    chosen: dict[int, int],
) -> None:
    manifest, decoder, _ = good
    layout = decoder_layout(changed(decoder, "inputs_embeds", ranges=tokens(*ranges)), manifest.model, "fp32")
    assert layout.chunk == chunk
    assert {count: layout.profile(count).index for count in chosen} == chosen


def test_place_keeps_tensors_apart_and_aligned() -> None:
    buffers = {
        "a": Buffer(np.dtype(np.int64), (1,)),
        "b": Buffer(np.dtype(bool), (1, 300)),
        "c": Buffer(np.dtype("<u2"), (0,)),
    }
    offsets, size = place(buffers)
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    ends = {name: offsets[name] + buffer.nbytes for name, buffer in buffers.items()}
    assert ends["a"] <= offsets["b"] < ends["b"] <= offsets["c"] <= size


def test_embeddings_are_last(good: tuple[Manifest, PlanInfo, PlanInfo]) -> None:
    """So that the copy of a shorter chunk may end early."""
    manifest, decoder, _ = good
    assert list(decoder_layout(decoder, manifest.model, "fp32").inputs(5))[-1] == graph.INPUTS_EMBEDS
