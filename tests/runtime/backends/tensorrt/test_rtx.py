"""What TensorRT for RTX itself answers our code on a machine with no GPU: which errors it logs, and how it refuses.

Real: all of it, in a process of its own. A plan is not loaded here, which needs a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]

CODE = """
import json, sys
from pathlib import Path
from runtime.backends.tensorrt.engine import TensorRTRuntime
from runtime.bundle.targets import TARGETS
from runtime.errors import BackendError

folder, library = map(Path, sys.argv[1:])
tensorrt = TensorRTRuntime(TARGETS["trt-rtx"])
heard = []
tensorrt.logger.hear = heard.append

def refused(work):
    try:
        work()
    except BackendError as error:
        return str(error)

class Device:
    name, compute_capability = "none", 89

def registered(version):
    return refused(lambda: tensorrt.load_plugins(library, {"FusedMoE": version}))

answer = {
    "nowhere": refused(lambda: tensorrt.load_plugins(folder / "nowhere.so", {"FusedMoE": 1})),
    "other": refused(lambda: tensorrt.load_plugins(Path("libm.so.6"), {"FusedMoE": 1})),
}
heard.clear()
answer |= {"first": registered(1), "again": registered(1), "heard": list(heard), "version": registered(2)}
(folder / "x.plan").write_bytes(b"x" * 1000)
answer["plan"] = refused(lambda: tensorrt.load(folder / "x.plan", Device, ""))
json.dump(answer, sys.stdout)
"""


@pytest.fixture(scope="module")
def answer(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path_factory.mktemp("rtx"), library],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_library_that_is_none(answer: Any) -> None:
    head = "TensorRT for RTX 1.7.1.116: cannot load the plugin library"
    assert answer["nowhere"].startswith(f"{head} ")
    assert "nowhere.so: cannot open shared object file" in answer["nowhere"]
    assert answer["other"].startswith(f"{head} libm.so.6: IPluginRegistry::loadLibrary: ")
    assert "getCreators" in answer["other"]


def test_asking_for_plugins_is_no_error(answer: Any) -> None:
    """TensorRT's own way to ask logs one, and it would be told in place of the first real one."""
    assert [answer["first"], answer["again"], answer["heard"]] == [None, None, []]


def test_a_library_of_another_version(answer: Any) -> None:
    """TensorRT would only say that one of its plugins is registered already."""
    assert answer["version"] == (
        "TensorRT for RTX 1.7.1.116: the plugin library of this process has no plugin FusedMoE of version 2: "
        "build it again with: monoedge plugin; then start again"
    )


def test_a_file_that_is_no_plan(answer: Any) -> None:
    assert "x.plan: IRuntime::deserializeCudaEngine: Error Code 1: Serialization (" in answer["plan"]
