"""The export's check of its own result: the files on disk, before they are called a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export.checkpoint.reader import Checkpoint
from export.errors import CheckpointError
from export.model.loading import load_decoder, load_vision
from export.model.trace import DTYPES, cache_names
from runtime.backends.graph import UPDATE
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH, VISUAL_DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError
from runtime.packages import install_command

QUANTIZED_TOLERANCE = 0.5
"""The same where matrices are integers. How much an answer may differ is for the calibration's report to say: this
tells a broken graph from one that rounds (seen: 0.09 in 8 bits, with random weights in a model of hidden size 128)."""

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
    yield check_graphs(folder, (VISION_GRAPH, DECODER_GRAPH))
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
        yield f"not checked: a forward pass, since onnxruntime is not installed: {install_command('onnxruntime')}"
        return
    differences = []
    for name, compare in ((VISION_GRAPH, _compare_vision), (DECODER_GRAPH, _compare_decoder)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        differences += compare(session, checkpoint, precision, max_length)
    yield require(differences, TOLERANCE[precision])


def check_graphs(folder: Path, names: Sequence[str]) -> str:
    """Checks graphs as ONNX does, and says so.

    Raises:
        CheckpointError: one does not pass.
    """
    for name in names:
        try:
            # By path: external data is looked at without being read into memory.
            onnx.checker.check_model(str(folder / name))
            model = onnx.load(str(folder / name), load_external_data=False)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise CheckpointError(f"{name} does not pass ONNX's checks: {str(error).splitlines()[0]}") from None
    return f"checked: onnx.checker and strict shape inference pass on {', '.join(names)}"


def require(differences: Pairs, tolerance: float) -> str:
    """Says how far a forward pass is from PyTorch.

    Raises:
        CheckpointError: farther than it may.
    """
    worst = float(np.max(differences))
    # Written so that NaN fails.
    if not worst <= tolerance:
        raise CheckpointError(
            f"the exported graphs differ from PyTorch by {worst:.1e} of the largest value, expected at most "
            f"{tolerance:.0e}: please report this"
        )
    return f"checked: a forward pass differs from PyTorch by {worst:.1e} of the largest value"


def check_cpu_bundle(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[str]:
    """Checks a bundle of form ``cpu`` in the making, and says what was checked.

    Raises:
        CheckpointError: the export went wrong; nothing should be kept.
    """
    yield check_graphs(bundle.folder, (VISION_GRAPH, DECODER_GRAPH, VISUAL_DECODER_GRAPH))
    manifest = bundle.manifest
    if checkpoint.source_bytes > SMALL_BYTES:
        yield (
            f"not checked: a forward pass against PyTorch, which is run for checkpoints up to {SMALL_BYTES >> 20} MiB"
        )
        return
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    try:
        backend = OnnxRuntimeBackend(bundle)
    except BackendError as error:
        yield f"not checked: a forward pass, since {error}"
        return
    max_length = manifest.model.max_length
    pixels = _pixels(checkpoint, manifest.precision)
    with torch.no_grad():
        seen = load_vision(checkpoint, torch.float32)(pixels).flatten(0, 1)
    differences = [_difference(backend.encode_image(pixels.numpy()), seen)]
    module = load_decoder(checkpoint, torch.float32, max_length)
    embeds, visual, positions, caches = _sequence(checkpoint, manifest.precision, max_length)
    context, length = backend.new_context(), embeds.shape[1]
    context.reserve(length)
    # In two chunks that both end in a token of text.
    for start, stop in ((0, length * 11 // 16), (length * 11 // 16, length)):
        chunk = slice(start, stop)
        with torch.no_grad():
            expected, caches = module(
                embeds[:, chunk], visual[:, chunk], positions[:, chunk], torch.tensor([start]), caches
            )
        logits = context.forward(embeds[0, chunk].numpy(), visual[0, chunk].numpy(), start)
        if logits is not None:
            differences.append(_difference(logits, expected[0]))
    yield require(differences, TOLERANCE["fp32"] if manifest.quantization is None else QUANTIZED_TOLERANCE)


Pairs = list[float]
"""Differences of output pairs, each relative to the largest value expected."""


def _compare_vision(session: Any, checkpoint: Checkpoint, precision: str, max_length: int) -> Pairs:  # noqa: ANN401
    pixels = _pixels(checkpoint, precision)
    module = _refusing_overflow(load_vision(checkpoint, DTYPES[precision]), "vision", precision)
    with torch.no_grad():
        expected = module(pixels)
    (got,) = session.run(None, {"pixel_values": pixels.numpy()})
    return [_difference(got, expected)]


def _compare_decoder(session: Any, checkpoint: Checkpoint, precision: str, max_length: int) -> Pairs:  # noqa: ANN401
    """One prompt of text, image and text again, then one token on the cache that it left."""
    config, dtype = checkpoint.config, DTYPES[precision]
    module = _refusing_overflow(load_decoder(checkpoint, dtype, max_length), "decoder", precision)
    embeds, visual, positions, caches = _sequence(checkpoint, precision, max_length)
    length = embeds.shape[1]
    names = cache_names(config.num_hidden_layers, "past_key_values")
    differences: Pairs = []
    for start, stop in ((0, length - 1), (length - 1, length)):
        if start == stop:
            continue
        chunk = slice(start, stop)
        inputs = (embeds[:, chunk], visual[:, chunk], positions[:, chunk], torch.tensor([start]))
        with torch.no_grad():
            expected, present = module(*inputs, caches)
        feeds = dict(zip(("inputs_embeds", "visual_mask", "position_ids", "write_indices"), inputs, strict=True))
        feeds |= dict(zip(names, caches, strict=True))
        got = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
        updates = session.get_outputs()[-1].name.startswith(UPDATE)
        written = [cache[:, :, chunk] for cache in present] if updates else present
        differences += map(_difference, got, [expected, *written])
        caches = present
    return differences


def _sequence(
    checkpoint: Checkpoint, precision: str, max_length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Text, image and text again: embeddings, visual mask and positions, and caches of zeros."""
    config, dtype, length = checkpoint.config, DTYPES[precision], min(max_length, 16)
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    positions = torch.arange(length)[None]
    visual = (positions % 8 > 2) & (positions < length - 1)
    text_embeds = next(checkpoint.embedding_blocks(dtype))
    with torch.no_grad():
        visual_embeds = load_vision(checkpoint, dtype)(_pixels(checkpoint, precision))[0]
    # Embeddings as a conversation has them, so that activations are of the size that they will be.
    embeds = torch.where(visual[..., None], visual_embeds[:length], text_embeds[-length:])
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.num_hidden_layers)]
    return embeds, visual, positions, caches


def _pixels(checkpoint: Checkpoint, precision: str) -> torch.Tensor:
    size = checkpoint.config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DTYPES[precision])


def _refusing_overflow(module: torch.nn.Module, graph: str, precision: str) -> torch.nn.Module:
    """The module, made to stop at the first layer whose result is not finite."""

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


def _difference(got: np.ndarray[Any, Any], expected: torch.Tensor) -> float:
    reference = expected.double().numpy()
    return float(np.abs(got.astype(np.float64) - reference).max() / max(np.abs(reference).max(), 1e-12))
