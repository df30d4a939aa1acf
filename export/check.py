"""The export's check of its own result: the bundle answers as PyTorch does, before it is put in place."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.checkpoint.reader import Checkpoint
from export.checkpoint.tensors import embedding_parameter
from export.errors import CheckpointError
from export.model.weights import DTYPES, load_decoder, load_vision
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError

SMALL_BYTES = 256 << 20
"""Checkpoints up to this size are run and compared with PyTorch."""

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "w8a16": 0.5, "w4a16": 0.5}
"""Greatest difference between ONNX Runtime and PyTorch, relative to the largest value, by precision or by the mode of
quantization.

fp16 is generous: ONNX Runtime's CPU provider computes it in float32 between casts, PyTorch does not. Integers may be
further off: a calibration's report says how much answers differ, and this check only tells a broken graph from one that
rounds (seen: 0.09 in 8 bits, with random weights in a model of hidden size 128).
"""


def check_forward(bundle: Bundle, checkpoint: Checkpoint) -> str:
    """Compares what a bundle of a checkpoint computes with PyTorch: an image, and text with it in pieces on one cache.

    Returns:
        What was found, or why nothing was compared.

    Raises:
        CheckpointError: they differ, or values overflow.
        BackendError: ONNX Runtime cannot run a graph.
    """
    manifest = bundle.manifest
    precision, max_length = manifest.precision, manifest.model.max_length
    skipped = "not checked: a forward pass against PyTorch"
    if checkpoint.source_bytes > SMALL_BYTES:
        return f"{skipped}, which is run for checkpoints up to {SMALL_BYTES >> 20} MiB"
    form = precision if manifest.quantization is None else manifest.quantization.mode
    if form not in TOLERANCE:
        return f"{skipped}, since ONNX Runtime has no {form} kernels for CPUs"
    try:
        from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

        backend = OnnxRuntimeBackend(bundle)
    except BackendError as error:
        return f"{skipped}, since {error}"
    dtype = DTYPES[precision]
    vision = _refusing_overflow(load_vision(checkpoint, dtype), "vision", precision)
    decoder = _refusing_overflow(load_decoder(checkpoint, dtype, max_length), "decoder", precision)
    length, context = min(max_length, 16), backend.new_context()
    context.reserve(length)
    size = checkpoint.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(length)[None]
    visual = (positions % 8 > 2) & (positions < length - 1)
    shape = (1, checkpoint.config.num_key_value_heads, length, checkpoint.config.head_dim)
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2 * checkpoint.config.num_hidden_layers)]
    with torch.no_grad():
        seen = vision(pixels).flatten(0, 1)
        differences = [_difference(backend.encode_image(pixels.numpy()), seen)]
        # Embeddings as a conversation has them, so that activations are of the size that they will be.
        table = next(checkpoint.blocks(embedding_parameter(checkpoint.config), dtype))
        embeds = torch.where(visual[..., None], seen[:length], table[-length:])
        # The last piece is one token, as in decoding.
        for start, stop in itertools.pairwise(sorted({0, length * 11 // 16, length - 1, length})):
            piece = slice(start, stop)
            given = (values[:, piece] for values in (embeds, visual, positions))
            expected, caches = decoder(*given, torch.tensor([start]), caches)
            logits = context.forward(embeds[0, piece].numpy(), visual[0, piece].numpy(), start)
            # A decoder of visual tokens alone gives none.
            if logits is not None:
                differences.append(_difference(logits, expected[0]))
    worst = float(np.max(differences))
    # Written so that NaN fails.
    if not worst <= TOLERANCE[form]:
        far = f"{worst:.1e} of the largest value, expected at most {TOLERANCE[form]:.0e}"
        raise CheckpointError(f"the exported graphs differ from PyTorch by {far}: please report this")
    return f"checked: a forward pass differs from PyTorch by {worst:.1e} of the largest value"


def _refusing_overflow(module: torch.nn.Module, graph: str, precision: str) -> torch.nn.Module:
    """Makes a module raise at the first layer whose result is not finite, and returns it."""

    def stop(name: str, result: Any) -> None:  # noqa: ANN401 - whatever a module returns
        tensor = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{graph}, {name}: activations overflow in {precision}" + "; use --dtype bf16" * (precision == "fp16")
            )

    for name, child in module.named_modules():
        if name:
            child.register_forward_hook(lambda _, __, result, name=name: stop(name, result))
    return module


def _difference(got: npt.NDArray[Any], expected: torch.Tensor) -> float:
    reference = expected.double().numpy()
    return float(np.abs(got.astype(np.float64) - reference).max() / max(np.abs(reference).max(), 1e-12))
