"""Backends by name: what each refuses here, and that on onnxruntime-gpu but for the GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnxruntime as ort
import pytest

import runtime
from runtime.backends import NAMES, open_backend
from runtime.bundle.reader import Bundle

GPU_NAMES = [name for name in NAMES if name != "onnxruntime"]


def refusal(bundle: Path | Bundle, name: str | None, threads: int | None = None) -> str:
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    with pytest.raises(runtime.MonoedgeError) as caught:
        open_backend(name, opened, threads)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name_lists_the_known(tiny_v1_bundle: Path) -> None:
    assert refusal(tiny_v1_bundle, "abacus") == (
        "backend 'abacus' is not known, expected one of: onnxruntime, tensorrt, onnxruntime-cuda"
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


def test_never_the_cpu_in_place_of_a_gpu(tiny_v1_bundle: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    message = refusal(tiny_v1_bundle, "onnxruntime-cuda")
    assert "has no CUDAExecutionProvider, only " in message
    assert message.endswith("then pip install onnxruntime-gpu (the two share one folder)")


def test_threads_are_of_the_cpu(tiny_v1_bundle: Path) -> None:
    assert "computes on the GPU: leave out threads=2" in refusal(tiny_v1_bundle, "onnxruntime-cuda", threads=2)


def test_onnxruntime_that_is_too_old(
    tiny_v1_bundle: Path, tiny_v1_portable_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.backends.onnxruntime.backend.ort.__version__", "1.23.2")
    assert refusal(tiny_v1_bundle, None) == (
        "onnxruntime 1.23.2 is too old for opset 24, expected 1.25 or later: pip install -U onnxruntime (Python 3.11 "
        "or later), or export the bundle with --target trt10.3, whose graphs are older"
    )
    assert open_backend(None, Bundle(tiny_v1_portable_bundle), None).description == "onnxruntime 1.23.2, CPU"
    monkeypatch.setattr("runtime.backends.onnxruntime.backend.ort.__version__", "1.16.3")
    assert refusal(tiny_v1_portable_bundle, None).endswith("expected 1.17 or later: pip install -U onnxruntime")
