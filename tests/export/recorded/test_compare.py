"""What a backend must answer to be let in: ONNX Runtime's own answers pass, and mistakes that engines make do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.recorded.compare import LIMITS, compare, signal_to_noise
from export.recorded.format import Recording, read
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.backends.onnxruntime.context import OnnxRuntimeContext
from runtime.bundle.manifest import DECODER_GRAPH, VISION_GRAPH
from runtime.bundle.reader import Bundle
from runtime.errors import BackendError

GRAPHS = (VISION_GRAPH, DECODER_GRAPH)


def weight(folder: Path, graph: str, name: str) -> np.ndarray:
    """A weight of an fp32 bundle, in place."""
    model = onnx.load(folder / graph, load_external_data=False)
    (item,) = [item for item in model.graph.initializer if item.name == name]
    place = {entry.key: entry.value for entry in item.external_data}
    return np.memmap(folder / place["location"], np.float32, "r+", int(place["offset"]), tuple(item.dims))


def refusal(backend: Any, bundle: Bundle, recording: Recording, precision: str = "bf16") -> str:
    """By the widest limit there is, as if the bundle were of that number format, for which no CPU has kernels."""
    manifest = replace(bundle.manifest, precision=precision)
    with pytest.raises(BackendError) as caught:
        compare(Fp32(backend), manifest, recording, GRAPHS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Fp32:
    """A backend for fp32, spoken to in bfloat16."""

    chunk = 128

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return (self._backend.encode_image(pixels).view(np.uint32) >> 16).astype(np.uint16)

    def new_context(self) -> Any:
        context = self._backend.new_context()
        forward = context.forward
        context.forward = lambda embeds, mask, start: forward(
            (embeds.astype(np.uint32) << 16).view(np.float32), mask, start
        )
        return context


@pytest.mark.parametrize("chunk", [7, 100, 512])
def test_onnx_runtime_agrees_with_itself(tiny_bundle: Path, chunk: int) -> None:
    bundle = Bundle(tiny_bundle)
    backend = OnnxRuntimeBackend(bundle)
    backend.chunk = chunk
    ratios = compare(backend, bundle.manifest, read(bundle), GRAPHS)
    assert set(ratios) == set(GRAPHS)
    assert min(ratios.values()) > 100


def test_number_formats_are_within_the_limits(tiny_bundle: Path) -> None:
    """Inputs in bfloat16 and nothing else: what is lost is far from the limit."""
    bundle = Bundle(tiny_bundle)
    manifest = replace(bundle.manifest, precision="bf16")
    ratios = compare(Fp32(OnnxRuntimeBackend(bundle)), manifest, read(bundle), GRAPHS)
    assert LIMITS["bf16"] + 6 < min(ratios.values()) < 60


@pytest.mark.parametrize("example", ["tiny_v1_bundle", "tiny_v15_bundle", "shapes_bundle"])
@pytest.mark.parametrize(
    "name",
    [
        "layers.1.feed_forward.visual_down",
        "layers.1.feed_forward.text_down",
        "layers.0.feed_forward.text_gate_up",
        "lm_head.weight",
    ],
)
def test_a_damaged_weight(example: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(example), tmp_path / "bundle"))
    matrix = weight(folder, DECODER_GRAPH, name)
    # Rows in the wrong order, as a wrong layout has them.
    matrix[:] = matrix[::-1].copy()
    matrix.flush()
    bundle = Bundle(folder)
    message = refusal(OnnxRuntimeBackend(bundle), bundle, read(bundle))
    assert message.startswith("decoder.onnx disagrees with what ONNX Runtime answered: ")
    assert f"expected at least {LIMITS['bf16']:.0f} in bf16; the largest difference is " in message


def test_a_damaged_vision_weight(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    matrix = weight(folder, VISION_GRAPH, "projector_in.weight")
    matrix[:] = matrix[::-1].copy()
    matrix.flush()
    bundle = Bundle(folder)
    assert refusal(OnnxRuntimeBackend(bundle), bundle, read(bundle)).startswith("vision.onnx disagrees ")


MASKS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "all text": (np.zeros_like, "after the prompt of "),
    "all visual": (np.ones_like, "after the prompt of "),
    "swapped": (np.invert, "after the prompt of "),
    "shifted": (lambda mask: np.roll(mask, -1) if len(mask) > 1 else mask, "after "),
    "visual from the answer on": (lambda mask: mask | (len(mask) == 1), ", read alone the signal-to-noise"),
}


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_rows_routed_to_the_wrong_expert(
    tiny_bundle: Path, case: tuple[Callable[[np.ndarray], np.ndarray], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = case
    forward = OnnxRuntimeContext.forward
    monkeypatch.setattr(
        OnnxRuntimeContext,
        "forward",
        lambda self, embeds, mask, start: forward(self, embeds, np.ascontiguousarray(change(mask)), start),
    )
    bundle = Bundle(tiny_bundle)
    assert words in refusal(OnnxRuntimeBackend(bundle), bundle, read(bundle))


def test_keys_written_to_the_wrong_place(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too early, from the first token of the answer on."""
    forward = OnnxRuntimeContext.forward
    monkeypatch.setattr(
        OnnxRuntimeContext,
        "forward",
        lambda self, embeds, mask, start: forward(self, embeds, mask, start - (len(embeds) == 1)),
    )
    bundle = Bundle(tiny_bundle)
    assert ", read alone" in refusal(OnnxRuntimeBackend(bundle), bundle, read(bundle))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite(tiny_v1_bundle: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = OnnxRuntimeContext.forward

    def spoiled(self: OnnxRuntimeContext, embeds: np.ndarray, mask: np.ndarray, start: int) -> np.ndarray:
        logits = forward(self, embeds, mask, start)
        logits[5] = value
        return logits

    monkeypatch.setattr(OnnxRuntimeContext, "forward", spoiled)
    bundle = Bundle(tiny_v1_bundle)
    assert refusal(OnnxRuntimeBackend(bundle), bundle, read(bundle)).startswith("decoder.onnx disagrees")


def test_signal_to_noise() -> None:
    signal = np.array([3.0, -4.0, 0.0], np.float32)
    assert signal_to_noise(signal, signal) == np.inf
    assert signal_to_noise(1.1 * signal, signal) == pytest.approx(20, abs=1e-3)
    assert signal_to_noise(1.01 * signal, signal) == pytest.approx(40, abs=1e-3)
    assert signal_to_noise(signal + np.float32(0.5), signal) == pytest.approx(10 * np.log10(25 / 0.75), abs=1e-3)
