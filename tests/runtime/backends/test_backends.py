"""Backends by name: what each refuses here, and the providers of onnxruntime-gpu but for the GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import runtime
from runtime.backends import NAMES, open_backend
from runtime.backends.onnxruntime_gpu import SHAPE_OPERATORS, CudaProviderBackend, TensorRTProviderBackend
from runtime.bundle.reader import Bundle

from ..test_golden import CASES, GOLDEN, LOGITS_TOLERANCE, load_case

GPU_NAMES = [name for name in NAMES if name != "onnxruntime"]


def refusal(bundle: Path | Bundle, name: str | None, threads: int | None = None) -> str:
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    with pytest.raises(runtime.MonoedgeError) as caught:
        open_backend(name, opened, threads)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name_lists_the_known(tiny_v1_bundle: Path) -> None:
    assert refusal(tiny_v1_bundle, "abacus") == (
        "backend 'abacus' is not known, expected one of: onnxruntime, tensorrt, onnxruntime-cuda, onnxruntime-tensorrt"
    )


def test_the_default_computes_on_the_cpu(tiny_v1_bundle: Path) -> None:
    backend = open_backend(None, Bundle(tiny_v1_bundle), None)
    assert backend.description == f"onnxruntime {ort.__version__}, CPU"
    assert (backend.chunk, backend.max_length) == (512, 8192)
    assert backend.length_limit == "the bundle was exported with --max-length 8192"


@pytest.mark.skipif(importlib.util.find_spec("pycuda") is not None, reason="pycuda is installed")
def test_tensorrt_without_pycuda(tiny_v1_bundle: Path) -> None:
    # Each time, not only the first.
    for _ in range(2):
        assert refusal(tiny_v1_bundle, "tensorrt") == "pycuda is not installed; this adds it: pip install pycuda"


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_never_the_cpu_in_place_of_a_gpu(tiny_v1_bundle: Path, name: str) -> None:
    provider = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}[name]
    if provider in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    message = refusal(tiny_v1_bundle, name)
    assert f"has no {provider}, only " in message
    assert message.endswith("then pip install onnxruntime-gpu (the two share one folder)")


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_threads_are_of_the_cpu(tiny_v1_bundle: Path, name: str) -> None:
    assert "computes on the GPU: leave out threads=2" in refusal(tiny_v1_bundle, name, threads=2)


# The providers' code, with the provider that is here in the place of CUDA's -------------------------------------------


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
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        message = refusal(tiny_v1_bundle, "onnxruntime-cuda")
    assert "ONNX Runtime cannot use its CUDAExecutionProvider: install" in message


def test_older_graphs_are_for_others(tiny_v1_portable_bundle: Path) -> None:
    with pytest.raises(runtime.BackendError, match="has graphs of opset 20: export it for opset 24"):
        OnHost(Bundle(tiny_v1_portable_bundle))


def test_options_of_the_tensorrt_provider(tiny_v1_bf16_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tiny_v1_bf16_bundle / "manifest.json"
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    backend = TensorRTProviderBackend.__new__(TensorRTProviderBackend)
    backend.bundle = Bundle(tiny_v1_bf16_bundle)
    ((name, options),) = backend._providers("decoder.onnx")
    assert name == "TensorrtExecutionProvider"
    assert options["trt_extra_plugin_lib_paths"] == str(library)
    assert options["trt_engine_cache_path"].startswith("/caches/monoedge/onnxruntime/")
    assert options["trt_bf16_enable"] is True
    assert options["trt_fp16_enable"] is False
    assert options["trt_profile_max_shapes"] == "inputs_embeds:1x512x128,visual_mask:1x512,position_ids:1x512"
    ((_, other),) = backend._providers("vision.onnx")
    assert "trt_extra_plugin_lib_paths" not in other
    assert other["trt_engine_cache_path"] != options["trt_engine_cache_path"]


def test_onnxruntime_that_is_too_old(
    tiny_v1_bundle: Path, tiny_v1_portable_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.backends.onnxruntime.ort.__version__", "1.23.2")
    assert refusal(tiny_v1_bundle, None) == (
        "onnxruntime 1.23.2 is too old for opset 24, expected 1.25 or later: pip install -U onnxruntime (Python 3.11 "
        "or later), or export the bundle with --target trt10.3, whose graphs are older"
    )
    assert open_backend(None, Bundle(tiny_v1_portable_bundle), None).description == "onnxruntime 1.23.2, CPU"
    monkeypatch.setattr("runtime.backends.onnxruntime.ort.__version__", "1.16.3")
    assert refusal(tiny_v1_portable_bundle, None).endswith("expected 1.17 or later: pip install -U onnxruntime")
