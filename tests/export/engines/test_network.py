"""Graphs as TensorRT wants them: the capacity fixed, shapes for each profile."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export.engines.plan import (
    CAPACITY,
    InputShapes,
    Range,
    decoder_profiles,
    fix_dimension,
    input_shapes,
    vision_profile,
)
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError, OptionError


@pytest.fixture
def decoder(tiny_bundle: Path) -> onnx.ModelProto:
    return onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False)


def test_profiles_of_the_decoder(decoder: onnx.ModelProto, tiny_bundle: Path) -> None:
    facts = Bundle(tiny_bundle).manifest.model
    fix_dimension(decoder, CAPACITY, 512)
    prefill, decode = (input_shapes(decoder, profile) for profile in decoder_profiles(512, 128, batch=2))
    assert list(prefill) == [value.name for value in decoder.graph.input]
    assert prefill["inputs_embeds"] == InputShapes(
        (2, 1, facts.hidden_size), (2, 128, facts.hidden_size), (2, 128, facts.hidden_size)
    )
    assert prefill["visual_mask"] == prefill["position_ids"] == InputShapes((2, 1), (2, 128), (2, 128))
    one = (2, 1, facts.hidden_size)
    assert decode["inputs_embeds"] == InputShapes(one, one, one)
    for shapes in (prefill, decode):
        assert shapes["write_indices"] == InputShapes((2,), (2,), (2,))
        caches = [shapes[name] for name in shapes if name.startswith("past_key_values.")]
        cache = (2, facts.num_key_value_heads, 512, facts.head_dim)
        assert caches == [InputShapes(cache, cache, cache)] * (2 * facts.num_hidden_layers)


def test_fixed_capacity_holds_everywhere(decoder: onnx.ModelProto) -> None:
    fix_dimension(decoder, CAPACITY, 512)
    assert CAPACITY not in str(decoder.graph.input) + str(decoder.graph.output) + str(decoder.graph.value_info)
    inferred = onnx.shape_inference.infer_shapes(decoder, strict_mode=True)
    present = {value.name: value for value in inferred.graph.output}["present.0.key"]
    assert present.type.tensor_type.shape.dim[2].dim_value == 512


def test_profile_of_the_vision_graph(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "vision.onnx", load_external_data=False)
    shapes = input_shapes(model, vision_profile(7))["pixel_values"]
    assert [shape[0] for shape in (shapes.minimum, shapes.optimum, shapes.maximum)] == [1, 7, 7]
    assert shapes.minimum[1:] == shapes.maximum[1:]


def test_refused(decoder: onnx.ModelProto) -> None:
    with pytest.raises(OptionError, match=r"^capacity must be 1 or more, got 0$"):
        fix_dimension(decoder, CAPACITY, 0)
    with pytest.raises(BundleError, match=r'has no dimension "length": export the bundle again$'):
        fix_dimension(decoder, "length", 8)
    with pytest.raises(BundleError, match='has a dimension "sequence", and the profile gives batch: '):
        input_shapes(decoder, {"batch": Range.only(1)})
    for chunk in (0, 513):
        with pytest.raises(OptionError, match=f"from 1 to the cache's capacity of 512 tokens, got {chunk}$"):
            decoder_profiles(512, chunk)
    with pytest.raises(OptionError, match=r"^batch must be 1 or more, got 0$"):
        decoder_profiles(512, 128, 0)
    with pytest.raises(OptionError, match=r"^tiles must be 1 or more, got 0$"):
        vision_profile(0)
