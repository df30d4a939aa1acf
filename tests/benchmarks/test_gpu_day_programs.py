"""The GPU day's own programs on a CPU: kernels are emulated, memory is the host's; the plugin's code is real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_day import agree, build, carry, pixels  # noqa: E402
from plugins_trt.schema import PLUGIN_OPERATORS  # noqa: E402
from runtime.errors import MonoedgeError  # noqa: E402
from tests.plugins_trt.kernels import CORE, HERE, build_for_cpu  # noqa: E402
from tests.plugins_trt.preprocess_library import resize_on_cpu  # noqa: E402
from tests.plugins_trt.problems import Problem  # noqa: E402

FEW = 2 * 20
"""Problems of the first two shapes: decode. The others, prefill and generic, take a minute here."""


def tell(monkeypatch: pytest.MonkeyPatch, program: object, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    program.main()


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_for_cpu(tmp_path_factory.getbasetemp()).library._name)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's sources and what plays TensorRT's part, linked to emulated kernels."""
    folders = (*(ROOT / "build/cuda_headers").rglob("include"), Path("/usr/local/cuda/include"))
    cuda = next((folder for folder in folders if (folder / "crt/host_defines.h").is_file()), None)
    headers = carry.find_headers()
    if cuda is None:
        pytest.skip("CUDA's headers are not here; this fetches them: make build/cuda_headers")
    if headers is None:
        pytest.skip("TensorRT's headers are not here; this fetches them: make build/tensorrt_headers")
    folder = tmp_path_factory.mktemp("plugin")
    gcc = ["g++", "-std=c++17", "-O1", "-fPIC"]
    emulated = [*gcc, "-Wno-unknown-pragmas", "-DMONOEDGE_EMULATION", f"-I{HERE / 'emulation'}", f"-I{CORE}"]
    emulated += ["-include", "cuda_runtime.h", "-x", "c++", "-c", CORE / "experts.cu", "-o", folder / "experts.o"]
    subprocess.run(emulated, check=True)
    # The host's runtime would answer for a device that is not here.
    names = (f'extern "C" char const* cudaGetError{what}(int) {{ return "?"; }}' for what in ("Name", "String"))
    (folder / "names.cpp").write_text("\n".join(names))
    sources = [*sorted((ROOT / "plugins_trt/trt").glob("*.cpp")), ROOT / "benchmarks/gpu_day/plugin_call.cpp"]
    linked = [*gcc, "-Wall", "-Wextra", "-Werror", "-shared", "-isystem", headers, "-isystem", cuda, *sources]
    linked += [folder / "names.cpp", folder / "experts.o", "-o", folder / "libplugin.so"]
    subprocess.run(linked, check=True)
    return folder / "libplugin.so"


def test_problems_are_every_form_on_every_path() -> None:
    problems = agree.small_problems()
    assert len(problems) == len(agree.SHAPES) * len(PLUGIN_OPERATORS) * 2
    forms = Counter((agree._form(problem), problem.type) for problem in problems)
    assert set(forms.values()) == {len(agree.SHAPES)}
    assert {form for form, _ in forms} == {operator.name for operator in PLUGIN_OPERATORS}
    everything = agree.all_problems()
    assert set(problems) < set(everything)
    assert all(agree._form(problem) for problem in everything)
    assert any(problem.size == 8192 and problem.text == "w8a8" for problem in everything)


def test_kernels_agree(kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tell(monkeypatch, agree, "--kernels", kernels, "--memory", "host", "--most", FEW)
    assert capsys.readouterr().out == f"the kernels: {FEW} problems agree with float64, and twice with the same bits\n"


def test_the_plugin_agrees(plugin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tell(monkeypatch, agree, "--plugin", plugin, "--memory", "host", "--most", FEW, "--unwritten")
    told = f"the plugin's enqueue: {FEW} problems agree with float64, and twice with the same bits\n"
    assert capsys.readouterr().out == told


def test_a_refused_node_is_told_with_its_problem(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agree, "PLUGIN_OPERATORS", (replace(PLUGIN_OPERATORS[0], name="FusedMoEOfLater"),))
    with pytest.raises(MonoedgeError, match=r"FusedMoE-1x128x96-.*: the plugin refuses the node"):
        tell(monkeypatch, agree, "--plugin", plugin, "--memory", "host")
    assert capfd.readouterr().err == "FusedMoEOfLater: the definition has no operator FusedMoEOfLater\n"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("output", f"the kernels: {FEW} of {FEW} problems do not agree with float64"),
        ("second", r"FusedMoE-1x128x96-alternating-bfloat16-float\+float: a second run gave other bits"),
        ("status", r"FusedMoE-1x128x96-alternating-bfloat16-float\+float: the call returned 1"),
        ("beyond", "something was written outside of a tensor"),
    ],
)
def test_what_is_wrong_is_found(kernels: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, told: str) -> None:
    """Kernels that are right, and something that spoils what they do."""
    opened = agree.ThroughKernels.open

    def spoiled(self: agree.ThroughKernels, problem: Problem) -> tuple[int, agree.Enqueue]:
        size, enqueue = opened(self, problem)
        runs = [0]

        def call(at: agree.Addresses) -> int:
            status, bytes_ = enqueue(at), 2 * problem.rows * problem.out
            begin = at["output"] + (bytes_ if spoil == "beyond" else 0)
            memory = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * bytes_).from_address(begin))
            runs[0] += 1
            if spoil in ("output", "beyond") or (spoil == "second" and runs[0] == 2):
                memory[:] ^= 8
            return 1 if spoil == "status" else status

        return size, call

    monkeypatch.setattr(agree.ThroughKernels, "open", spoiled)
    with pytest.raises(MonoedgeError, match=told):
        tell(monkeypatch, agree, "--kernels", kernels, "--memory", "host", "--most", FEW)


def test_tiles_have_pillows_bits(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    resize_on_cpu(folder)
    monkeypatch.setattr(pixels, "TILES", pixels.TILES[:1])
    monkeypatch.setattr(pixels, "SIZES", pixels.SIZES[:3])
    tell(monkeypatch, pixels, folder / "libpreprocess.so", "--memory", "host")
    assert capsys.readouterr().out == "tiles of 9 pictures have the bits that the host computes with Pillow\n"
    monkeypatch.setattr(pixels.ImageProcessor, "__call__", lambda *_: np.float32(0))
    with pytest.raises(MonoedgeError, match=r"90×40 in float32, tiles of 32: .* values differ"):
        tell(monkeypatch, pixels, folder / "libpreprocess.so", "--memory", "host")


def test_no_driver_is_one_line(kernels: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day.agree", "--kernels", str(kernels)]
    environment = {"PATH": "", "LD_LIBRARY_PATH": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if result.returncode == 0:
        pytest.skip("there is a GPU")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_nvcc_compiles_what_plays_tensorrts_part(tmp_path: Path) -> None:
    headers = carry.find_headers()
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if headers is None:
        pytest.skip("TensorRT's headers are not here; this fetches them: make build/tensorrt_headers")
    source = ROOT / "benchmarks/gpu_day/plugin_call.cpp"
    words = ("-Xcompiler=-fPIC,-Wall,-Wextra,-Werror", "-isystem", headers, "-c", source, "-o", tmp_path / "call.o")
    subprocess.run(build.nvcc("90", *words), check=True)


def test_the_build_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho experts.cu: it is wrong >&2\nexit 4\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MonoedgeError, match=f"{nvcc} failed with exit code 4; what it says is above"):
        tell(monkeypatch, build, "kernels", tmp_path / "built", "--arch", "90")
    assert "experts.cu: it is wrong" in capfd.readouterr().err
