"""The export's check of its own result: the files on disk, before they are called a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export.checkpoint import Checkpoint
from export.config import CheckpointError
from export.graphs import DTYPES, cache_names
from export.loading import load_decoder, load_vision
from runtime.bundle import DECODER_GRAPH, VISION_GRAPH

SMALL_BYTES = 256 << 20
"""Checkpoints up to this size are also run and compared with PyTorch."""

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Greatest difference between ONNX Runtime and PyTorch, relative to the largest value.

fp16 is generous: ONNX Runtime's CPU provider computes it in float32 between casts, PyTorch does not.
"""


def check_bundle(folder: Path, checkpoint: Checkpoint, precision: str, max_length: int) -> Iterator[str]:
    """Checks the graphs of a bundle in the making, and says what was checked.

    Raises:
        CheckpointError: the export went wrong; nothing should be kept.
    """
    for name in (VISION_GRAPH, DECODER_GRAPH):
        try:
            # By path: external data is looked at without being read into memory.
            onnx.checker.check_model(str(folder / name))
            model = onnx.load(str(folder / name), load_external_data=False)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise CheckpointError(f"{name} does not pass ONNX's checks: {str(error).splitlines()[0]}") from None
    yield "checked: onnx.checker and strict shape inference pass on both graphs"
    if checkpoint.source_bytes > SMALL_BYTES:
        yield (
            f"not checked: a forward pass against PyTorch, which is run for checkpoints up to {SMALL_BYTES >> 20} MiB"
        )
        return
    if precision not in TOLERANCE:
        yield f"not checked: a forward pass, since ONNX Runtime's CPU provider has no {precision} kernels"
        return
    try:
        import onnxruntime
    except ImportError:
        yield "not checked: a forward pass, since onnxruntime is not installed; pip install 'monoedge[cpu]' adds it"
        return
    worst = 0.0
    for name, differ in ((VISION_GRAPH, _compare_vision), (DECODER_GRAPH, _compare_decoder)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        worst = max(worst, differ(session, checkpoint, precision, max_length))
    # Written so that NaN fails.
    if not worst <= TOLERANCE[precision]:
        raise CheckpointError(
            f"the exported graphs differ from PyTorch by {worst:.1e} of the largest value, expected at most "
            f"{TOLERANCE[precision]:.0e}" + ("; float16 may overflow here, use --dtype bf16" * (precision == "fp16"))
        )
    yield f"checked: a forward pass differs from PyTorch by {worst:.1e} of the largest value"


def _compare_vision(session: Any, checkpoint: Checkpoint, precision: str, max_length: int) -> float:  # noqa: ANN401
    dtype, size = DTYPES[precision], checkpoint.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = load_vision(checkpoint, dtype)(pixels)
    (got,) = session.run(None, {"pixel_values": pixels.numpy()})
    return _difference(got, expected)


def _compare_decoder(session: Any, checkpoint: Checkpoint, precision: str, max_length: int) -> float:  # noqa: ANN401
    """One prompt of text, image and text again, then one token on the cache that it left."""
    config, dtype = checkpoint.config, DTYPES[precision]
    generator, length = torch.Generator().manual_seed(1), min(max_length, 16)
    module = load_decoder(checkpoint, dtype, max_length)
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
    names, worst = cache_names(config.num_hidden_layers, "past_key_values"), 0.0
    for start, stop in ((0, length - 1), (length - 1, length)):
        embeds = torch.randn(1, stop - start, config.hidden_size, generator=generator).to(dtype) * 0.05
        positions = torch.arange(start, stop)[None]
        visual = (positions % 8 > 2) & (start == 0)
        inputs = (embeds, visual, positions, torch.tensor([start]))
        with torch.no_grad():
            expected, present = module(*inputs, caches)
        feeds = dict(zip(("inputs_embeds", "visual_mask", "position_ids", "write_indices"), inputs, strict=True))
        feeds |= dict(zip(names, caches, strict=True))
        got = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        worst = max(worst, *map(_difference, got, [expected, *present]))
        caches = present
    return worst


def _difference(got: np.ndarray[Any, Any], expected: torch.Tensor) -> float:
    reference = expected.double().numpy()
    return float(np.abs(got.astype(np.float64) - reference).max() / max(np.abs(reference).max(), 1e-12))
