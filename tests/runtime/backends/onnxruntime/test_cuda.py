"""The CUDA provider's backend, but for the GPU: the provider that is here computes in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import runtime
from runtime.backends import open_backend
from runtime.backends.onnxruntime.cuda import SHAPE_OPERATORS, CudaProviderBackend
from runtime.bundle.reader import Bundle

from ...test_golden import CASES, GOLDEN, LOGITS_TOLERANCE, load_case


class OnHost(CudaProviderBackend):
    provider, device = "CPUExecutionProvider", "cpu"


@pytest.mark.parametrize("name", CASES)
def test_answers_as_the_official_code(tiny_bundle: Path, name: str) -> None:
    model = runtime.Model(Bundle(tiny_bundle), OnHost(Bundle(tiny_bundle)))
    case, tensors = load_case(tiny_bundle.name, name)
    images = [GOLDEN / "images" / file for file, _ in case["images"]]
    max_tiles = case["images"][0][1] if images else None
    session = model.session(images, case["questions"][0], max_tiles=max_tiles, max_new_tokens=8, return_logits=True)
    assert session.text is not None
    expected = tensors["turn0.step_logits" if len(case["turns"]) > 1 else "step_logits"]
    np.testing.assert_allclose(session.logits, expected[:8], rtol=0, atol=LOGITS_TOLERANCE)


def test_a_node_that_is_left_to_another_provider_is_refused(
    tiny_v1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime's CUDA provider leaves what it has no kernels for, without a word."""

    class Elsewhere(OnHost):
        provider = "AzureExecutionProvider"

    if Elsewhere.provider not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider without kernels")
    with pytest.raises(runtime.BackendError) as caught:
        Elsewhere(Bundle(tiny_v1_bundle))
    message = str(caught.value)
    assert "does not compute all of" in message
    assert "Gemm on CPUExecutionProvider" in message
    assert not any(f" {name} on " in message for name in SHAPE_OPERATORS)


def test_a_provider_that_cannot_start_is_refused(tiny_v1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu without CUDA's libraries has the provider and then a session without it."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(runtime.BackendError, match="ONNX Runtime cannot use its CUDAExecutionProvider: install"),
    ):
        open_backend("onnxruntime-cuda", Bundle(tiny_v1_bundle), None)


def test_older_graphs_are_for_others(tiny_v1_portable_bundle: Path) -> None:
    with pytest.raises(runtime.BackendError, match="has graphs of opset 20: export it for opset 24"):
        OnHost(Bundle(tiny_v1_portable_bundle))
