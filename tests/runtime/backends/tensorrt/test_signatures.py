"""Every call to TensorRT that our code makes is one that each TensorRT has, with these arguments.

Real: NVIDIA's Python modules of every release that bundles are for. Those of full TensorRT come as wheels without the
libraries; empty ones stand in, with which they can be imported and asked what calls they have. Nothing is called.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ....cuda_driver.nvinfer import building

ROOT = Path(__file__).resolve().parents[4]
FILES = ("runtime/backends/tensorrt/library.py", "runtime/backends/tensorrt/engine.py", "export/engines/child.py")
"""All of our code that knows TensorRT's module."""

RTX = "rtx"
CONFIG = "ICudaEngine.create_runtime_config"
ALIAS = "ICudaEngine.get_aliased_input_tensor"
CAPTURE = "IExecutionContext.is_stream_capturable"
STRATEGY = "DynamicShapesKernelSpecializationStrategy"
ABSENT = {
    "10.3": {CONFIG, ALIAS, CAPTURE},
    "10.13": {ALIAS, CAPTURE, STRATEGY},
    "10.14": {ALIAS, CAPTURE, STRATEGY},
    "11.4": {CAPTURE, STRATEGY},
    RTX: set(),
}
"""What a release does not have of what our code asks for before it calls it."""


def check(version: str, code: dict[str, str]) -> Any:
    job = {"paths": [], "module": "tensorrt_rtx", "target": "trt-rtx", "code": code}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if version != RTX:
        job |= {"paths": [str(building.bindings(version))], "module": "tensorrt_bindings", "target": "trt"}
        environment["LD_LIBRARY_PATH"] = str(building.empty_libraries())
    elif importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("signatures.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    return {file: (ROOT / file).read_text() for file in FILES}


@pytest.mark.parametrize("version", ABSENT)
def test_every_call_is_there(code: dict[str, str], version: str) -> None:
    answer = check(version, code)
    assert answer["version"].startswith("1.7.1" if version == RTX else version)
    assert answer["wrong"] == []
    assert set(answer["absent"]) == ABSENT[version]
    # It has looked: one call of each class that code is written for.
    assert {
        *("Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"),
        *("IExecutionContext.execute_async_v3", "IBuilderConfig.add_optimization_profile"),
        *("IPluginRegistry.load_library", "IPluginRegistry.all_creators", "ILogger.log", "OnnxParser.parse"),
        *("Builder.build_serialized_network", "ParserError.node_operator", "IOptimizationProfile.set_shape"),
        *("ITimingCache.serialize", "IProgressMonitor.step_complete"),
    } <= set(answer["checked"])
    assert ("IRuntimeCache.deserialize" in answer["checked"]) == (version == RTX)


def test_files_are_all_that_know_tensorrt() -> None:
    found = {
        str(file.relative_to(ROOT))
        for package in ("runtime", "export", "plugins_trt", "calibration")
        for file in (ROOT / package).rglob("*.py")
        if re.search(r"\btrt\.[A-Z_a-z]|\.trt\b", file.read_text())
    }
    assert found == set(FILES)


@pytest.mark.parametrize("version", ["10.3", RTX])
def test_wrong_calls_are_found(version: str) -> None:
    code = """
class Engine:
    def run(self, engine: Any, context: Any, other: Any):
        context = engine.create_execution_context()
        context.set_input_shape("name")
        context.set_input_shape("name", (1, 2), 3)
        context.set_input_shape(name="name", shapes=(1, 2))
        context.set_input_shape("name", (1, 2))
        context.enqueue_v2()
        engine.num_io_tensors = 3
        trt.OnnxParser(trt.Builder(None), None)
        if hasattr(engine, "no_such"):
            engine.no_such().other()
    def _never(self, engine: Any):
        engine.no_such()
class Log(trt.ILogger):
    def log(self, message):
        pass
"""
    answer = check(version, {"code.py": code})
    wrong = [line.split(": ", 1) for line in answer["wrong"]]
    assert [int(place.split(":")[1]) for place, _ in wrong] == [3, 5, 6, 7, 9, 10, 11, 17]
    assert "what is other of run?" in wrong[0][1]
    assert wrong[4][1] == "there is no IExecutionContext.enqueue_v2"
    assert wrong[5][1] == "ICudaEngine.num_io_tensors cannot be set"
    assert answer["absent"] == ["ICudaEngine.no_such"]
