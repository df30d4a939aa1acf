"""Compares a backend's outputs with those of ONNX Runtime in the recorded set.

The measure is the signal-to-noise ratio of each call's output, as polygraphy's ``--compare snr`` has it: the mean
square of the output over that of the difference, in decibels. 20 dB are a difference of 10 % of the output, 40 dB of
1 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.recorded.format import Call, Recording, narrow, wide
from runtime.backends import Backend
from runtime.backends.graph import INPUTS_EMBEDS, LOGITS, PIXEL_VALUES, VISUAL_EMBEDS, VISUAL_MASK
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest
from runtime.errors import BackendError

LIMITS = {"fp32": 80.0, "fp16": 38.0, "bf16": 20.0}
"""Least ratio in dB, by the bundle's number format; that of bf16 is also polygraphy's default.

Measured with PyTorch in that format, the worst of nine calls, for a test checkpoint, the example, and for bf16 24
layers of random weights: fp32 111 to 118, fp16 45 to 50, bf16 28 to 35. Measured with mistakes: all tokens as text, -4
to 1; tokens after the prompt as visual, -8 to -3; the one token before the image as visual, 5 to 20, where rounding
alone may be with bf16.
"""


def compare(backend: Backend, manifest: Manifest, recording: Recording, graphs: tuple[str, ...]) -> dict[str, float]:
    """Repeats the recorded calls of ``graphs``, ``vision.onnx`` or ``decoder.onnx``, and compares their outputs.

    The manifest and the recorded set are those of the bundle that the backend runs.

    Returns:
        The least ratio of each graph, in dB.

    Raises:
        BackendError: the backend failed, or a ratio is below the limit; the message names the first such call.
    """
    runs = {VISION_GRAPH: _vision, DECODER_GRAPH: _decoder}
    return {graph: runs[graph](backend, manifest, recording[graph]) for graph in graphs}


def tokens_of(calls: Sequence[Call]) -> int:
    """Returns how many tokens the caches must hold to repeat calls of the decoder."""
    return sum(call.inputs[INPUTS_EMBEDS].shape[1] for call in calls)


def _vision(backend: Backend, manifest: Manifest, calls: list[Call]) -> float:
    ratios = []
    for call in calls:
        got = wide(backend.encode_image(call.inputs[PIXEL_VALUES]), manifest.precision)
        ratios.append(_checked(VISION_GRAPH, "the picture", got, call.outputs[VISUAL_EMBEDS], manifest))
    return min(ratios)


def _decoder(backend: Backend, manifest: Manifest, calls: list[Call]) -> float:
    context = backend.new_context()
    context.reserve(tokens_of(calls))
    ratios, start = [], 0
    for call in calls:
        embeds = narrow(call.inputs[INPUTS_EMBEDS][0], manifest.precision)
        visual_mask = call.inputs[VISUAL_MASK][0]
        length = len(embeds)
        for begin in range(0, length, backend.chunk):
            chunk = slice(begin, begin + backend.chunk)
            logits = context.forward(embeds[chunk], visual_mask[chunk], start + begin)
        assert logits is not None  # noqa: S101 - every call ends in a token of text
        step = f"the prompt of {length} tokens" if not start else f"token {start + 1}, read alone"
        ratios.append(_checked(DECODER_GRAPH, step, logits, call.outputs[LOGITS], manifest))
        start += length
    return min(ratios)


def _checked(
    graph: str, step: str, got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], manifest: Manifest
) -> float:
    ratio, least = signal_to_noise(got, expected), LIMITS[manifest.precision]
    # Written so that NaN fails.
    if not ratio >= least:
        differences = np.abs(got.ravel() - expected.ravel())
        raise BackendError(
            f"{graph} disagrees with what ONNX Runtime answered: after {step} the signal-to-noise ratio is "
            f"{ratio:.1f} dB, expected at least {least:.0f} in {manifest.precision}; the largest difference is "
            f"{differences.max():.3g}, where values have a standard deviation of {expected.std():.3g}"
        )
    return ratio


def signal_to_noise(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Returns the ratio in dB; infinite for equal values, NaN where one is not finite."""
    signal = expected.astype(np.float64).ravel()
    noise = got.astype(np.float64).ravel() - signal
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.mean(signal**2) / np.mean(noise**2)))
