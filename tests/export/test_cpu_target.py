"""``--target cpu``: a decoder for each kind of tokens, in ONNX Runtime's own operators; answers are in test_golden."""

from __future__ import annotations

import collections
import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from safetensors.torch import load_file

import runtime
from export.errors import QuantizationError
from export.onnx import main
from export.quantized.bundle import write_quantized
from export.quantized.plan import QuantizationPlan
from export.quantized.quantize import SHRINKING, absmax_scale
from export.recording import main as record
from plugins_trt.schema import DOMAIN
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, VISION_GRAPH, VISUAL_DECODER_GRAPH, Quantization
from runtime.bundle.reader import Bundle
from runtime.errors import BundleError, OptionError

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests/data/golden"
DECODERS = (DECODER_GRAPH, VISUAL_DECODER_GRAPH)
LAYERS = 4

Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Exports a tiny checkpoint, once."""
    folder = tmp_path_factory.mktemp("cpu")

    def made(version: str, weights: str) -> Path:
        target = folder / f"{version}-{weights}"
        if not target.exists():
            checkpoint = GOLDEN / version / "checkpoint"
            main(["--ckpt", str(checkpoint), "-o", str(target), "--target", "cpu", "--weights", weights])
        return target

    return made


def graph(bundle: Path, name: str) -> onnx.GraphProto:
    return onnx.load(bundle / name, load_external_data=False).graph


def values(bundle: Path, name: str) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(bundle / name).graph.initializer}


# The graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("version", ["tiny-v1", "tiny-v15"])
def test_each_layer_is_four_products_and_one_attention(make: Make, version: str, weights: str) -> None:
    bundle = make(version, weights)
    product = "Gemm" if weights == "fp32" else "MatMulNBits"
    # The last layer's visual rows end with their keys and values, and have no head.
    for name, products in ((DECODER_GRAPH, 4 * LAYERS + 1), (VISUAL_DECODER_GRAPH, 4 * (LAYERS - 1) + 1)):
        counts = collections.Counter(node.op_type for node in graph(bundle, name).node)
        assert (counts[product], counts["GroupQueryAttention"]) == (products, LAYERS)
        assert not counts.keys() & {"Attention", "RotaryEmbedding", "TensorScatter", "NonZero", "ScatterND"}
        assert counts["Gemm"] + counts["MatMulNBits"] == products
        model = onnx.load(bundle / name, load_external_data=False)
        assert not model.functions
        assert DOMAIN not in {node.domain for node in model.graph.node}
        names = [node.name for node in model.graph.node]
        assert all(names)
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("version", ["tiny-v1", "tiny-v15"])
def test_no_expert_has_the_others_weights(make: Make, version: str) -> None:
    bundle = make(version, "int8")
    text, visual = ({item.name for item in graph(bundle, name).initializer} for name in DECODERS)
    assert not [name for name in text if "visual" in name]
    assert not [name for name in visual if "text" in name or "lm_head" in name]
    assert ("layers.0.attention.qkv.weight" in visual) == (version == "tiny-v1")
    # What both use is in the bundle once.
    places = {
        item.name: {entry.key: entry.value for entry in item.external_data}
        for item in graph(bundle, VISUAL_DECODER_GRAPH).initializer
        if item.external_data
    }
    for item in graph(bundle, DECODER_GRAPH).initializer:
        if item.name in places:
            assert places[item.name] == {entry.key: entry.value for entry in item.external_data}


def test_inputs_are_what_the_node_needs(make: Make) -> None:
    caches = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    for name, logits in zip(DECODERS, (["logits"], []), strict=True):
        decoder = graph(make("tiny-v15", "fp32"), name)
        past = [f"past_key_values.{cache}" for cache in caches]
        assert [item.name for item in decoder.input] == ["inputs_embeds", "write_indices", *past]
        assert [item.name for item in decoder.output] == [*logits, *(f"present.{cache}" for cache in caches)]


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_nothing_stands_between_weights_and_products_once_optimized(
    make: Make, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime makes of the graphs: weights go into their products as they lie, neither cast nor copied."""
    bundle, options = make("tiny-v15", weights), OnnxRuntimeBackend._options

    def saving(self: OnnxRuntimeBackend, prepacked: bool = False) -> ort.SessionOptions:
        made = options(self, prepacked)
        made.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return made

    monkeypatch.setattr(OnnxRuntimeBackend, "_options", saving)
    backend = OnnxRuntimeBackend(Bundle(bundle))
    shutil.copyfile(bundle / DECODER_WEIGHTS, tmp_path / DECODER_WEIGHTS)
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    counts = collections.Counter(node.op_type for node in optimized.node)
    product = "Gemm" if weights == "fp32" else "MatMulNBits"
    # ONNX Runtime knows silu(gate) by itself.
    assert (counts[product], counts["GroupQueryAttention"], counts["QuickGelu"]) == (4 * LAYERS + 1, LAYERS, LAYERS)
    assert not counts.keys() & {"Transpose", "DequantizeLinear", "CastLike", "Identity", "Sigmoid"}
    stored = values(bundle, DECODER_GRAPH)
    held = {item.name: numpy_helper.to_array(item) for item in optimized.initializer}
    for node in optimized.node:
        if node.op_type == product:
            np.testing.assert_array_equal(held[node.input[1]], stored[node.input[1]])
    # Per layer: the products, attention, two norms, two sums, the gate's three; Gemm has reshapes around.
    most = 12 if weights != "fp32" else 36
    assert len(optimized.node) <= most * LAYERS + 20
    assert backend.decoder.get_providers() == ["CPUExecutionProvider"]


# What runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_text_alone_opens_nothing_for_pictures(make: Make, weights: str) -> None:
    model = runtime.load(make("tiny-v15", weights))
    backend = model.backend
    assert isinstance(backend, OnnxRuntimeBackend)
    assert model.session(prompt="Hello", max_new_tokens=3).text is not None
    assert set(backend._opened) == {DECODER_GRAPH}
    if sys.platform == "linux":
        assert "decoder_visual" not in Path("/proc/self/maps").read_text()
    picture = GOLDEN / "images/portrait.png"
    assert model.session(picture, "What is it?", max_tiles=1, max_new_tokens=1).text is not None
    assert set(backend._opened) == {DECODER_GRAPH, VISION_GRAPH, VISUAL_DECODER_GRAPH}


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_rows_are_computed_by_their_own_expert(make: Make, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of three stretches: each decoder gets the rows of its kind, and nothing behind the filling is written."""
    bundle = make("tiny-v15", weights)
    backend = OnnxRuntimeBackend(Bundle(bundle))
    facts, rng = backend.bundle.manifest.model, np.random.default_rng(0)
    embeds = rng.standard_normal((12, facts.hidden_size)).astype("f")
    mask = np.zeros(12, bool)
    mask[3:9] = True
    seen: list[tuple[bool, int, int]] = []
    context = backend.new_context()
    run = context._run

    def watched(decoder, rows, visual, start):  # type: ignore[no-untyped-def]
        assert (visual == visual[0]).all()
        assert (decoder.session is backend.decoder) == (not visual[0])
        seen.append((bool(visual[0]), len(rows), start))
        return run(decoder, rows, visual, start)

    monkeypatch.setattr(context, "_run", watched)
    context.reserve(16)
    logits = context.forward(embeds, mask, 0)
    assert seen == [(False, 3, 0), (True, 6, 3), (False, 3, 9)]
    assert logits is not None
    for cache in context._caches:
        assert not cache[:, :, 12:].any()
        assert cache[:, :, :12].any(axis=(1, 3)).all()
    assert context.forward(embeds[3:9], mask[3:9], 12 - 6) is None  # no token is chosen after a visual one


def test_several_sequences_at_once(make: Make) -> None:
    """The graph takes a token of each, at a place of its own in its caches: as one by one."""
    bundle = Bundle(make("tiny-v15", "fp32"))
    facts, rng = bundle.manifest.model, np.random.default_rng(1)
    session = ort.InferenceSession(bundle.path(DECODER_GRAPH), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()][2:]
    shape = (2, facts.num_key_value_heads, 16, facts.head_dim)
    starts = np.array([5, 2])
    caches = {name: np.zeros(shape, "f") for name in names}
    for cache in caches.values():
        for row, start in enumerate(starts):
            cache[row, :, :start] = rng.standard_normal((shape[1], start, shape[3]))
    embeds = rng.standard_normal((2, 1, facts.hidden_size)).astype("f")

    def run(rows: slice) -> list[np.ndarray]:
        past = {name: cache[rows] for name, cache in caches.items()}
        return session.run(None, {"inputs_embeds": embeds[rows], "write_indices": starts[rows], **past})

    together = run(slice(0, 2))
    for row in range(2):
        for both, alone in zip(together, run(slice(row, row + 1)), strict=True):
            np.testing.assert_allclose(both[row], alone[0], rtol=0, atol=2e-5)


# The numbers -------------------------------------------------------------------------------------------------------


def blocks_of(weight: np.ndarray, size: int) -> np.ndarray:
    filled = np.zeros((len(weight), -(-weight.shape[1] // size) * size))
    filled[:, : weight.shape[1]] = weight
    return filled.reshape(len(weight), -1, size)


def checkpoint_matrices(version: str) -> dict[str, np.ndarray]:
    theirs = load_file(GOLDEN / version / "checkpoint/model.safetensors")
    layer = "language_model.model.layers.1.feed_forward"
    tensor = {name: value.float().numpy() for name, value in theirs.items()}
    return {
        "layers.1.feed_forward.text_gate_up": np.concatenate([tensor[f"{layer}.{w}.weight"] for w in ("w1", "w3")]),
        "layers.1.feed_forward.text_down": tensor[f"{layer}.w2.weight"],
        "lm_head.weight": tensor["language_model.output.weight"],
    }


def test_int8_is_the_nearest_number_with_a_scale_a_block(make: Make) -> None:
    stored = values(make("tiny-v15", "int8"), DECODER_GRAPH)
    for name, weight in checkpoint_matrices("tiny-v15").items():
        numbers, scales = stored[name].astype(np.float64) - 128, stored[f"{name}_scale"].astype(np.float64)
        wanted = blocks_of(weight.astype(np.float64), numbers.shape[2])
        np.testing.assert_allclose(scales, np.abs(wanted).max(axis=2) / 127, rtol=1e-6)
        assert np.abs(numbers * scales[..., None] - wanted).max(axis=2).max() <= scales.max() / 2 * (1 + 1e-5)


def test_int4_of_the_experts_is_what_onnx_runtime_reads(make: Make) -> None:
    """Low half of a byte first, 8 standing for 0; and no block is off by more than with the whole range of 4 bits."""
    stored = values(make("tiny-v15", "int4"), DECODER_GRAPH)
    for name, weight in checkpoint_matrices("tiny-v15").items():
        packed, scales = stored[name], stored[f"{name}_scale"]
        rows, columns = weight.shape
        bits, size = (8, packed.shape[2]) if name == "lm_head.weight" else (4, packed.shape[2] * 2)
        assert size == (128 if bits == 8 else 32)
        node = helper.make_node(
            "MatMulNBits",
            ["x", name, f"{name}_scale"],
            ["y"],
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=bits,
            block_size=size,
        )
        tensors = [numpy_helper.from_array(packed, name), numpy_helper.from_array(scales, f"{name}_scale")]
        x, y = (helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None) for value in "xy")
        imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(
            helper.make_graph([node], "one", [x], [y], tensors), opset_imports=imports, ir_version=11
        )
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (read,) = session.run(None, {"x": np.eye(columns, dtype="f")})
        if bits == 8:
            numbers = packed.astype(np.float64) - 128
        else:
            numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(float) - 8
        meant = (numbers * scales[..., None]).reshape(rows, -1)[:, :columns]
        np.testing.assert_allclose(read.T, meant, rtol=0, atol=1e-6)
        if bits == 4:
            wanted = blocks_of(weight, size).astype(np.float64)
            place = np.abs(wanted).argmax(axis=2)
            full = np.take_along_axis(wanted, place[..., None], axis=2) / -8
            plain = np.rint(wanted / full).clip(-8, 7) * full
            error = np.square(blocks_of(meant, size) - wanted).sum(axis=2)
            assert (error <= np.square(plain - wanted).sum(axis=2) * (1 + 1e-4)).all()
            assert {round(float(factor), 2) for factor in np.unique(scales / full[..., 0])} <= set(SHRINKING)


def test_zeros_have_a_scale() -> None:
    from export.quantized.quantize import in_blocks

    for bits in (8, 4):
        packed, scales = in_blocks(np.zeros((3, 40), "f"), 32, bits)
        assert packed.shape == (3, 2, 4 * bits)
        assert (packed == (128 if bits == 8 else 0x88)).all()
        assert np.isfinite(scales).all()
    assert absmax_scale(np.zeros((1, 8), "f")) == 1


# The bundle --------------------------------------------------------------------------------------------------------


def test_manifest_says_what_is_stored(make: Make) -> None:
    both = ("text", "visual")
    for weights, mode in (("fp32", None), ("int8", "w8a16"), ("int4", "w4a16")):
        manifest = Bundle(make("tiny-v15", weights), verify=True).manifest
        assert manifest.by_expert
        assert manifest.operators == {}
        expected = None if mode is None else Quantization(mode, "cpu", both, attention=True, lm_head=True)
        assert manifest.quantization == expected
        assert not [name for name in manifest.files if name.startswith("recording/")]


def test_same_checkpoint_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    checkpoint = GOLDEN / "tiny-v1/checkpoint"
    main(["--ckpt", str(checkpoint), "-o", str(tmp_path / "again"), "--target", "cpu", "--weights", "int8"])
    first, second = (
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        for folder in (make("tiny-v1", "int8"), tmp_path / "again")
    )
    assert first == second


def test_a_conversation_of_one_token_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = GOLDEN / "tiny-v1/checkpoint"
    main(["--ckpt", str(checkpoint), "-o", str(tmp_path / "out"), "--target", "cpu", "--max-length", "1"])
    assert Bundle(tmp_path / "out").manifest.model.max_length == 1
    assert "a forward pass differs from PyTorch by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "int8"], "--weights int8 is for --target cpu: add that, or leave it out"),
        (["--target", "trt10.3", "--weights", "int4"], "--weights int4 is for --target cpu"),
        (["--target", "cpu", "--dtype", "bf16"], "--target cpu computes in fp32: leave out --dtype bf16"),
    ],
    ids=["weights", "other-target", "dtype"],
)
def test_refused_options(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        main(["--ckpt", str(GOLDEN / "tiny-v1/checkpoint"), "-o", str(tmp_path / "out"), *options])
    assert not list(tmp_path.iterdir())


def test_what_is_for_other_bundles_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = make("tiny-v1", "fp32")
    with pytest.raises(QuantizationError, match="made for a CPU already: export one without --target cpu"):
        write_quantized(Bundle(bundle), tmp_path / "out", QuantizationPlan("w8a16", ()))
    with pytest.raises(BundleError, match="made for ONNX Runtime on a CPU: no engine"):
        record(["--bundle", str(bundle)])
