"""Graphs in older operators: they compute what the graphs that they are made of compute, and nothing newer is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.passes.nodes import OPSET
from export.passes.portable import IR_VERSION, portable
from plugins_trt.function import opset_of
from plugins_trt.schema import DOMAIN, VERSION
from runtime.backends.graph import PAST, PRESENT, UPDATE
from runtime.bundle.engines import WEIGHTS
from runtime.bundle.manifest import DECODER_GRAPH, REQUIRED_FILES, VISION_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError

Values = dict[str, np.ndarray]
TOLERANCE = 1e-5
"""Greatest difference of two graphs in float32, relative to the largest value; seen: 3e-6."""

CAPACITY, BATCH = 24, 2


def run(model: onnx.ModelProto, inputs: Values) -> Values:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in model.graph.output]
    return dict(zip(names, session.run(names, inputs), strict=True))


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path) -> onnx.ModelProto:
    return onnx.load(tiny_bundle / DECODER_GRAPH)


def random_inputs(model: onnx.ModelProto, rng: np.random.Generator, starts: list[int], length: int) -> Values:
    """A chunk for each sequence of a batch; what the caches hold is random in all places."""
    hidden = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    cache = model.graph.input[-1].type.tensor_type.shape.dim
    shape = (BATCH, cache[1].dim_value, CAPACITY, cache[3].dim_value)
    write_indices = np.array(starts)
    return {
        "inputs_embeds": rng.standard_normal((BATCH, length, hidden)).astype(np.float32),
        "visual_mask": rng.random((BATCH, length)) < 0.4,
        "position_ids": write_indices[:, None] + np.arange(length),
        "write_indices": write_indices,
        **{
            value.name: rng.standard_normal(shape).astype(np.float32)
            for value in model.graph.input
            if value.name.startswith(PAST)
        },
    }


CALLS = {
    "prefill": ([0, 0], 7, 0),
    "a chunk behind others": ([9, 9], 5, 0),
    "a token": ([11, 11], 1, 0),
    "the last place": ([CAPACITY - 1, CAPACITY - 1], 1, 0),
    "up to the last place": ([CAPACITY - 6, CAPACITY - 6], 6, 0),
    "all places": ([0, 0], CAPACITY, 0),
    "a batch of other places": ([3, 14], 4, 0),
    "a batch at both ends": ([0, CAPACITY - 1], 1, 0),
    # Which no caller of ours has: what stands in the caches behind the chunk is then seen too.
    "positions ahead of their places": ([2, 8], 3, 5),
}


@pytest.mark.parametrize("name", CALLS)
def test_decoder_computes_the_same(decoder: onnx.ModelProto, name: str) -> None:
    starts, length, ahead = CALLS[name]
    inputs = random_inputs(decoder, np.random.default_rng(len(name)), starts, length)
    inputs["position_ids"] = inputs["position_ids"] + ahead
    expected, got = run(decoder, inputs), run(portable(decoder), inputs)
    assert_same(got.pop("logits"), expected.pop("logits"))
    for name, update in got.items():
        cache = inputs[PAST + name.removeprefix(UPDATE)].copy()
        for row, start in enumerate(starts):
            cache[row, :, start : start + length] = update[row]
        assert_same(cache, expected.pop(PRESENT + name.removeprefix(UPDATE)))
    assert expected == {}


def test_what_caches_hold_elsewhere_does_not_matter(decoder: onnx.ModelProto) -> None:
    """Of float32's largest numbers too."""
    made = portable(decoder)
    inputs = random_inputs(decoder, np.random.default_rng(0), [4, 9], 3)
    expected = run(made, inputs)
    for name in inputs:
        if name.startswith(PAST):
            for row, start in enumerate([4, 9]):
                inputs[name][row, :, start:] = np.float32(3e37)
    for name, got in run(made, inputs).items():
        np.testing.assert_array_equal(got, expected[name])


def test_vision_computes_the_same(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / VISION_GRAPH)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 448, 448)).astype(np.float32)
    expected, got = (run(graph, {"pixel_values": pixels})["visual_embeds"] for graph in (model, portable(model)))
    assert_same(got, expected)


def test_bfloat16_computes_the_same(bf16_bundle: Path) -> None:
    """By ONNX's reference evaluator, whose own softmax in the newer graph is in bf16."""
    evaluators = []
    for change in (lambda model: model, portable):
        evaluators.append(ReferenceEvaluator(change(onnx.load(bf16_bundle / DECODER_GRAPH))))
    element = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    inputs = random_inputs(evaluators[0].proto_, np.random.default_rng(0), [2, 5], 4)
    inputs = {name: value.astype(element) if value.dtype == np.float32 else value for name, value in inputs.items()}
    old, new = (evaluator.run(["logits"], inputs)[0] for evaluator in evaluators)
    assert np.abs(old - new).max() <= 0.05 * np.abs(old).max()


@pytest.mark.parametrize("graph", [DECODER_GRAPH, VISION_GRAPH])
@pytest.mark.parametrize("name", ["tiny_v1_bundle", "tiny_v15_bundle", "tiny_v1_bf16_bundle", "tiny_v15_bf16_bundle"])
def test_nothing_newer_is_left(request: pytest.FixtureRequest, tmp_path: Path, name: str, graph: str) -> None:
    bundle = request.getfixturevalue(name)
    model = onnx.load(bundle / graph, load_external_data=False)
    before = model.SerializeToString()
    made = portable(model)
    assert model.SerializeToString() == before
    assert opset_of(made) == OPSET == 20
    assert made.ir_version == IR_VERSION == helper.find_min_ir_version_for([helper.make_opsetid("", OPSET)])
    assert {entry.domain: entry.version for entry in made.opset_import}.get(DOMAIN, VERSION) == VERSION
    for body in made.functions:
        assert {entry.domain: entry.version for entry in body.opset_import} == {"": OPSET}
    # Types and attributes too are those of opset 20.
    onnx.save(made, tmp_path / graph)
    shutil.copy(bundle / WEIGHTS[graph], tmp_path)
    onnx.checker.check_model(str(tmp_path / graph), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True, data_prop=True)
    custom = [[node for node in each.graph.node if node.domain == DOMAIN] for each in (model, made)]
    assert [node.name for node in custom[0]] == [node.name for node in custom[1]]
    assert len({node.name for node in made.graph.node}) == len(made.graph.node)
    # The contract: what goes in is the same, what comes out too but for the caches.
    assert list(made.graph.input) == list(model.graph.input)
    before_, after = ({value.name: value for value in each.graph.output} for each in (model, inferred))
    assert [name.replace(PRESENT, UPDATE) for name in before_] == list(after)
    for name, value in after.items():
        if name.startswith(UPDATE):
            cache = before_[name.replace(UPDATE, PRESENT)]
            sizes = [dim.dim_param or dim.dim_value for dim in cache.type.tensor_type.shape.dim]
            sizes[2] = "sequence"
            assert value == helper.make_tensor_value_info(name, cache.type.tensor_type.elem_type, sizes)
        else:
            assert value == before_[name]
    # Weights lie where they lay.
    assert [(item.name, item.external_data) for item in made.graph.initializer] == [
        (item.name, item.external_data) for item in model.graph.initializer
    ]
    assert portable(made) is made


def test_exported_bundle(tiny_v1_portable_bundle: Path, tiny_v1_bundle: Path) -> None:
    """All that answers need, but the graphs, is byte for byte as in a bundle without ``--target``."""
    bundles = [Bundle(folder, verify=True).manifest for folder in (tiny_v1_portable_bundle, tiny_v1_bundle)]
    assert [manifest.opset for manifest in bundles] == [20, 24]
    differing = {name for name in REQUIRED_FILES if bundles[0].files[name] != bundles[1].files[name]}
    assert differing == {DECODER_GRAPH, VISION_GRAPH}
    for name in differing:
        model = onnx.load(tiny_v1_portable_bundle / name, load_external_data=False)
        onnx.checker.check_model(str(tiny_v1_portable_bundle / name), full_check=True)
        made = portable(onnx.load(tiny_v1_bundle / name, load_external_data=False))
        assert made.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


Change = Callable[[onnx.ModelProto], None]


def first(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def mask_of_another_form(model: onnx.ModelProto) -> None:
    first(model, "LessOrEqual").op_type = "Less"


def keys_that_are_no_cache(model: onnx.ModelProto) -> None:
    node = first(model, "Attention")
    node.input[1] = next(made.input[1] for made in model.graph.node if made.output[0] == node.input[1])


def soft_capped(model: onnx.ModelProto) -> None:
    first(model, "Attention").attribute.append(helper.make_attribute("softcap", 30.0))


def circular(model: onnx.ModelProto) -> None:
    mode = next(item for item in first(model, "TensorScatter").attribute if item.name == "mode")
    mode.s = b"circular"


def interleaved(model: onnx.ModelProto) -> None:
    next(item for item in first(model, "RotaryEmbedding").attribute if item.name == "interleaved").i = 1


def newer_operator(model: onnx.ModelProto) -> None:
    first(model, "Add").op_type = "BitCast"
    first(model, "BitCast").attribute.append(helper.make_attribute("to", 1))
    del first(model, "BitCast").input[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mask_of_another_form, r"Attention layers\.0\.attention/Attention is not attention over caches"),
        (keys_that_are_no_cache, r"Attention layers\.0\.attention/Attention is not attention over caches"),
        (soft_capped, r"Attention layers\.0\.attention/Attention has softcap = 30\.0, unknown here"),
        (circular, r"TensorScatter layers\.0\.attention/TensorScatter has mode = circular"),
        (interleaved, r"RotaryEmbedding layers\.0\.attention/RotaryEmbedding has interleaved = 1"),
        (newer_operator, "has no form in opset 20|does not pass shape inference"),
    ],
)
def test_refused(tiny_v1_bundle: Path, change: Change, message: str) -> None:
    model = onnx.load(tiny_v1_bundle / DECODER_GRAPH, load_external_data=False)
    change(model)
    with pytest.raises(BundleError, match=message) as caught:
        portable(model)
    assert "\n" not in str(caught.value)


def test_only_a_cut_into_patches_is_a_product(tiny_v1_bundle: Path) -> None:
    model = onnx.load(tiny_v1_bundle / VISION_GRAPH, load_external_data=False)
    strides = next(item for item in first(model, "Conv").attribute if item.name == "strides")
    strides.ints[:] = [7, 7]
    # As the later shapes would not fit.
    del model.graph.node[1 + list(model.graph.node).index(first(model, "Conv")) :]
    del model.graph.value_info[:]
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info(model.graph.node[-1].output[0], TensorProto.FLOAT, [None] * 4)
    )
    with pytest.raises(BundleError, match=r"is not a cut into patches: export the bundle again$"):
        portable(model)
