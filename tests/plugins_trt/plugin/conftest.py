"""TensorRT for RTX, which builds plans on a machine with no GPU, with the plugin library loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.engines.plan import Range, input_shapes
from plugins_trt.schema import DOMAIN

ROOT = Path(__file__).resolve().parents[3]


class Rtx:
    """TensorRT for RTX with the plugin library loaded. Each call is a process of its own."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self._folder = folder
        # Its parser opens this name, which the wheel does not ship.
        spec = importlib.util.find_spec("tensorrt_rtx_libs")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        wheel = Path(spec.submodule_search_locations[0])
        (folder / "libtensorrt_rtx.so").symlink_to(wheel / "libtensorrt_rtx.so.1")

    def __call__(
        self,
        model: onnx.ModelProto | None = None,
        path: Path | None = None,
        capability: str | None = None,
        profiles: Sequence[Mapping[str, Range]] = (),
    ) -> dict[str, Any]:
        """Parses a model, if given, and builds a plan of it, if a capability is given, as "SM89".

        Args:
            model: the model, or None to load the library only.
            path: the file that its external data lies beside.
            profiles: what the symbolic dimensions are in each optimization profile.
        """
        job: dict[str, Any] = {"library": str(self._library), "namespace": DOMAIN, "capability": capability}
        if model is not None:
            file = self._folder / "model.onnx"
            onnx.save(model, file)
            job |= {"model": str(file), "path": str(path or file)}
            job["profiles"] = [
                {
                    name: (shapes.minimum, shapes.optimum, shapes.maximum)
                    for name, shapes in input_shapes(model, profile).items()
                }
                for profile in profiles
            ]
        result = subprocess.run(
            [sys.executable, ROOT / "tests/plugins_trt/plugin/rtx_child.py"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            # Read when a process starts.
            env={**os.environ, "LD_LIBRARY_PATH": str(self._folder)},
        )
        assert result.returncode == 0, f"exit code {result.returncode}: {result.stdout}{result.stderr}"
        answer: dict[str, Any] = json.loads(result.stdout)
        return {**answer, "stderr": result.stderr}


@pytest.fixture(scope="session")
def rtx(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Rtx:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    return Rtx(library, tmp_path_factory.mktemp("rtx"))
