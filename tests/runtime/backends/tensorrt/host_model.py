"""Models whose engines ONNX Runtime computes, and what they have to answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from export.engines.options import Options
from export.engines.plan import plans
from runtime.backends.cuda.device import Device
from runtime.backends.tensorrt.answering import EngineBackend
from runtime.backends.tensorrt.check import decoder_layout, vision_layout
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS

from ...test_golden import GOLDEN, LOGITS_TOLERANCE, load_case, turn_tensors
from .host_device import Executor, HostEngine


def no_frames() -> Any:
    raise AssertionError("no picture here lies in device memory")


def open_on_engines(
    bundle: Path,
    device: Device,
    executor: Executor,
    max_length: int = 4096,
    open_resize: Callable[[], Any] = no_frames,
) -> runtime.Model:
    """A bundle on engines of the plans that ``export.engine`` would build, which compute in the device's queue."""
    opened = Bundle(bundle)
    manifest = opened.manifest
    target = TARGETS["trt" if manifest.opset > 20 else "trt10.3"]
    decoder, vision = plans(opened, Options(target, 89, max_length, 1))
    engine = HostEngine(executor, decoder, str(opened.path(decoder.graph)))
    eyes = HostEngine(executor, vision, str(opened.path(vision.graph)), scratch=5000)
    backend = EngineBackend(
        device,
        (engine, decoder_layout(engine.info, manifest.model, manifest.precision)),
        lambda: (eyes, vision_layout(eyes.info, manifest.model, manifest.image, manifest.precision)),
        open_resize,
        "engines in host memory",
        f"the engine was built for {max_length} (more take …)",
    )
    return runtime.Model(opened, backend)


def require_official_answer(model: runtime.Model, name: str) -> None:
    """Requires the texts, tokens and logits of a recorded case, turn by turn."""
    case, tensors = load_case(model.bundle.folder.name, name)
    images = [GOLDEN / "images" / file for file, _ in case["images"]]
    max_tiles = case["images"][0][1] if images else None
    session = model.session(images, case["questions"][0], max_tiles=max_tiles, max_new_tokens=32, return_logits=True)
    for turn, recorded in enumerate(case["turns"]):
        if turn:
            session.ask(case["questions"][turn])
        expected = turn_tensors(tensors, turn, len(case["turns"]))
        assert session.text == recorded["response"].strip()
        assert session.generated_ids == expected["generated_ids"].tolist()
        np.testing.assert_allclose(session.logits, expected["step_logits"], rtol=0, atol=LOGITS_TOLERANCE)
