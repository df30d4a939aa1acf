"""The PyTorch model and the exported graphs against the official code's intermediate tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from export.checkpoint.reader import Checkpoint
from export.model.weights import load_decoder, load_vision
from runtime.backends import open_backend
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle

GOLDEN = Path(__file__).resolve().parents[2] / "data/golden"

TOLERANCE = 1e-4
"""Greatest difference, relative to the largest value of the official tensor."""

BF16_TOLERANCE = 0.3
"""Greatest difference of bf16 logits from the official bf16 ones, which are up to 0.29 from fp32 themselves."""


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module", params=["tiny-v1", "tiny-v15"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


def run_decoder(
    checkpoint: Checkpoint, golden: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, np.ndarray], list[torch.Tensor], torch.Tensor]:
    """The whole prompt through the PyTorch decoder; what its modules return, by the official vectors' names."""
    config, length = checkpoint.config, len(golden["input_ids"])
    decoder = load_decoder(checkpoint, dtype, max_length=512, last_only=False)
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, of_input: bool = False):
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], result: object) -> None:
            value = args[0] if of_input else result[0] if isinstance(result, tuple) else result
            seen[name] = value[0].float().numpy()

        return hook

    decoder.layers[0].register_forward_hook(keep("hidden_after_layer0"))
    decoder.layers[0].attention.register_forward_hook(keep("layer0_attn_out"))
    decoder.layers[0].feed_forward.register_forward_hook(keep("layer0_ffn_in", of_input=True))
    decoder.layers[-1].register_forward_hook(keep("hidden_after_last_layer_prenorm"))
    decoder.norm.register_forward_hook(keep("hidden_final_normed"))
    caches = [
        torch.zeros(1, config.num_key_value_heads, 512, config.head_dim, dtype=dtype)
        for _ in range(2 * config.num_hidden_layers)
    ]
    with torch.no_grad():
        logits, present = decoder(
            torch.from_numpy(golden["inputs_embeds"])[None].to(dtype),
            torch.from_numpy(golden["visual_token_mask"].astype(bool))[None],
            torch.arange(length)[None],
            torch.zeros(1, dtype=torch.int64),
            caches,
        )
    return seen, present, logits[0]


def test_vision_matches(version: str) -> None:
    checkpoint = Checkpoint(GOLDEN / version / "checkpoint")
    golden = load_file(GOLDEN / version / "one_tile.safetensors")
    with torch.no_grad():
        got = load_vision(checkpoint, torch.float32)(torch.from_numpy(golden["pixel_values"]))
    assert_close(got.numpy(), golden["vit_embeds"])


def test_decoder_matches_layer_by_layer(version: str) -> None:
    checkpoint = Checkpoint(GOLDEN / version / "checkpoint")
    golden = load_file(GOLDEN / version / "one_tile.safetensors")
    length = len(golden["input_ids"])
    seen, present, logits = run_decoder(checkpoint, golden)
    for name, value in seen.items():
        assert_close(value, golden[name])
    assert_close(present[0][0, :, :length].numpy(), golden["kv_layer0_key"])
    assert_close(present[1][0, :, :length].numpy(), golden["kv_layer0_value"])
    assert logits.argmax(-1).tolist() == golden["prefill_argmax"].tolist()
    assert_close(logits[-1].numpy(), golden["prefill_last_logits"])


def test_bfloat16_matches_official_bfloat16(version: str) -> None:
    checkpoint = Checkpoint(GOLDEN / version / "checkpoint")
    golden = load_file(GOLDEN / version / "one_tile.safetensors")
    official = load_torch(GOLDEN / version / "one_tile.bf16.safetensors")
    _, _, logits = run_decoder(checkpoint, golden, torch.bfloat16)
    difference = (logits[-1] - official["prefill_last_logits"]).abs().max().item()
    assert difference <= BF16_TOLERANCE


def test_exported_decoder_matches_inside(tiny_bundle: Path, tmp_path: Path) -> None:
    """The values inside decoder.onnx, made outputs of a copy of the graph."""
    golden = load_file(GOLDEN / tiny_bundle.name / "one_tile.safetensors")
    model = onnx.load(tiny_bundle / DECODER_GRAPH)
    adds = [node for node in model.graph.node if node.op_type == "Add" and node.name.startswith("layers.0/")]
    norms = [node for node in model.graph.node if node.name.startswith("layers.0.ffn_norm/")]
    final = [node for node in model.graph.node if node.name.startswith("norm/")]
    wanted = {
        "layer0_ffn_in": norms[0].output[0],
        "hidden_after_layer0": adds[-1].output[0],
        "hidden_final_normed": final[-1].output[0],
    }
    for name in wanted.values():
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "inside.onnx")
    session = ort.InferenceSession(tmp_path / "inside.onnx", providers=["CPUExecutionProvider"])
    length = len(golden["input_ids"])
    facts = Bundle(tiny_bundle).manifest.model
    caches = {
        item.name: np.zeros((1, facts.num_key_value_heads, 512, facts.head_dim), np.float32)
        for item in session.get_inputs()[4:]
    }
    got = session.run(
        list(wanted.values()),
        {
            "inputs_embeds": golden["inputs_embeds"][None],
            "visual_mask": golden["visual_token_mask"].astype(bool)[None],
            "position_ids": np.arange(length)[None],
            "write_indices": np.zeros(1, np.int64),
            **caches,
        },
    )
    for name, value in zip(wanted, got, strict=True):
        expected = golden[name]
        # The last layer and the head work on the last position only.
        assert_close(value.reshape(-1, value.shape[-1]), expected[-1:] if name == "hidden_final_normed" else expected)


def test_bundle_computes_the_vision_and_key_value_vectors(tiny_bundle: Path) -> None:
    golden = load_file(GOLDEN / tiny_bundle.name / "one_tile.safetensors")
    bundle = Bundle(tiny_bundle)
    backend = open_backend(None, bundle, None)
    visual = backend.encode_image(golden["pixel_values"])
    assert_close(visual, golden["vit_embeds"][0])
    mask = golden["visual_token_mask"].astype(bool)
    embeds = np.array(bundle.embeddings()[golden["input_ids"]])
    embeds[mask] = visual
    assert_close(embeds, golden["inputs_embeds"])
    length = len(embeds)
    context = backend.new_context()
    context.reserve(512)
    assert_close(context.forward(embeds, mask, 0), golden["prefill_last_logits"])
    for cache, name in zip(context._caches, ("kv_layer0_key", "kv_layer0_value"), strict=False):
        assert_close(cache[0, :, :length], golden[name])
