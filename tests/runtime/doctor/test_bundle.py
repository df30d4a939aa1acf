"""What is said of a bundle: whether it is whole and fits, its engines, and which backends would answer from it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.backends.cuda.driver import Device
from runtime.bundle.engines import WEIGHTS, plan_name
from runtime.bundle.manifest import DECODER_GRAPH, MANIFEST, VISION_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.doctor.bundle import fit
from runtime.doctor.gpu import Gpu
from runtime.doctor.report import OK, WRONG, Finding

from .conftest import MakeLibrary
from .machines import BASE, Machine

TENSORRT = "__version__ = '10.15.1'\nclass ILogger: pass\n"
"""A module that says its version. It loads nothing, so that no engine could run."""


@pytest.fixture
def folder(tiny_v1_bundle: Path, tmp_path: Path) -> Path:
    """An fp32 bundle of the test's own."""
    return Path(shutil.copytree(tiny_v1_bundle, tmp_path / "bundle"))


@pytest.fixture
def bf16(tiny_v1_bf16_bundle: Path, tmp_path: Path) -> Path:
    """One in bf16."""
    return Path(shutil.copytree(tiny_v1_bf16_bundle, tmp_path / "bf16"))


def add_engines(folder: Path, chip: int = 89, target: str = "trt", **change: Any) -> dict[str, str]:
    """Puts engines into a bundle that are files of four bytes; returns their names by their graphs."""
    manifest = Bundle(folder).manifest
    engines, names = dict(manifest.engines), {}
    (folder / "engines").mkdir(exist_ok=True)
    for graph in (DECODER_GRAPH, VISION_GRAPH):
        record = EngineRecord(
            size=4,
            sha256="…",
            graph=graph,
            target=target,
            tensorrt="10.15.1.29",
            compute_capability=chip,
            plugin_sha256="",
            graph_sha256=manifest.files[graph].sha256,
            weights_sha256=manifest.files[WEIGHTS[graph]].sha256,
            max_length=512,
            max_batch=1,
        )
        names[graph] = plan_name(graph, target, chip, manifest.precision)
        (folder / names[graph]).write_bytes(b"plan")
        engines[names[graph]] = replace(record, **(change if graph == DECODER_GRAPH else {}))
    (folder / MANIFEST).write_text(replace(manifest, engines=engines).to_json())
    return names


def test_a_bundle_for_the_cpu(equipped: Machine, folder: Path) -> None:
    report = equipped.doctor("--bundle", str(folder), "--verify")
    assert (report.code, report.facts["backend"]) == (0, "onnxruntime")
    status, found, _ = report.said("bundle", "files")
    assert status == "ok"
    assert found.startswith(f"{folder}: checkpoint, fp32, opset 24, ")
    assert found.endswith("; sizes and SHA-256 are right")
    assert report.said("bundle", "main memory")[0] == "ok"
    status, found, _ = report.said("backends", "onnxruntime")
    assert status == "ok"
    assert found.startswith("onnxruntime ")
    assert found.endswith(", CPU, ready to read weights")
    assert report.said("backends", "tensorrt")[:2] == (
        "missing",
        "pycuda is not installed; this adds it: pip install pycuda",
    )
    assert report.said("backends", "onnxruntime-cuda")[1].startswith("the onnxruntime ")
    assert report.said("bundle", "engines")[2] == "for a GPU export the bundle with --dtype bf16"
    # For a GPU the same is not enough.
    report = equipped.doctor("--bundle", str(folder), "--backend", "tensorrt")
    assert report.code == 1
    assert report.finding("bundle", "engines")["hinders"]


def test_the_variable_names_a_bundle(equipped: Machine, folder: Path) -> None:
    assert equipped.doctor(MONOEDGE_BUNDLE=str(folder)).facts["bundle"] == str(folder)


def cut(folder: Path) -> None:
    weights = folder / WEIGHTS[DECODER_GRAPH]
    weights.write_bytes(weights.read_bytes()[:-1])


def alter(folder: Path) -> None:
    weights = folder / WEIGHTS[DECODER_GRAPH]
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (cut, "decoder.weights has "),
        (alter, "decoder.weights was altered, its SHA-256 is not that of manifest.json: copy the bundle again"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing: copy the bundle again"),
        (lambda folder: (folder / MANIFEST).unlink(), "is not a bundle: it has no manifest.json"),
        (shutil.rmtree, "no such bundle; make one with: python -m export.onnx --ckpt CKPT -o "),
    ],
    ids=["cut", "altered", "incomplete", "none", "nothing"],
)
def test_a_damaged_bundle(equipped: Machine, folder: Path, damage: Callable[[Path], object], found: str) -> None:
    damage(folder)
    report = equipped.doctor("--bundle", str(folder), "--verify")
    assert report.code == 1
    status, said, _ = report.said("bundle", "files")
    assert status == "wrong"
    assert found in said
    assert "\nverdict: 1 thing keeps backend onnxruntime from answering" in report.text


def test_a_bundle_in_bf16_is_for_a_gpu(equipped: Machine, bf16: Path) -> None:
    report = equipped.doctor("--bundle", str(bf16))
    assert (report.code, report.facts["backend"]) == (1, "tensorrt")
    assert report.said("bundle", "engines")[::2] == (
        "missing",
        f"on the device: python -m export.engine --bundle {bf16} --target trt",
    )
    assert "holds bf16, which needs a GPU" in report.said("backends", "onnxruntime")[1]


def test_engines_for_another_chip(with_gpu: Machine, bf16: Path) -> None:
    with_gpu.package("tensorrt", "10.15.1.29", "tensorrt", TENSORRT)
    names = add_engines(bf16, chip=87)
    report = with_gpu.doctor("--bundle", str(bf16))
    assert report.said("bundle", names[DECODER_GRAPH])[:2] == (
        "ok",
        "for trt 10.15.1.29, SM 87, 512 tokens: another GPU than this one, which is SM 89",
    )
    assert report.said("bundle", "engines")[:2] == (
        "missing",
        f"{bf16} has no engines for TensorRT on SM 89, only for trt on SM 87: build them with: "
        f"python -m export.engine --bundle {bf16} --target trt",
    )
    assert report.finding("bundle", "engines")["hinders"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"graph_sha256": "0"}, "was built from another decoder.onnx than the bundle has now"),
        ({"weights_sha256": "0"}, "was built with other decoder.weights than the bundle has now"),
        ({"size": 5}, "has 4 bytes, its record says 5"),
        ({"tensorrt": "10.3.0.26"}, "was built by version 10.3.0.26 of TensorRT, version 10.15.1 is here"),
    ],
    ids=str,
)
def test_engines_that_are_stale(with_gpu: Machine, bf16: Path, change: dict[str, Any], reason: str | None) -> None:
    with_gpu.package("tensorrt", "10.15.1.29", "tensorrt", TENSORRT)
    names = add_engines(bf16, **change)
    report = with_gpu.doctor("--bundle", str(bf16))
    status, found, _ = report.said("bundle", names[DECODER_GRAPH])
    if reason is None:
        assert (status, found) == ("ok", "for trt 10.15.1.29, SM 89, 512 tokens; of this bundle")
        return
    assert status == "wrong"
    assert found == (
        f"{reason}: build it again with: python -m export.engine --bundle {bf16} --target trt "
        "--max-length 512 --max-batch 1 --overwrite"
    )
    assert report.said("bundle", names[VISION_GRAPH])[0] == "ok"


def test_an_engine_is_held_against_a_library_that_loads(
    equipped: Machine, bf16: Path, make_library: MakeLibrary, tmp_path: Path
) -> None:
    """One that is broken is to be built again first: that may bring back the one that the engine was built with."""
    name = add_engines(bf16, plugin_sha256="1" * 64)[DECODER_GRAPH]
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF")
    for library, status in ((make_library(89), "wrong"), (broken, "ok")):
        report = equipped.doctor("--bundle", str(bf16), MONOEDGE_PLUGIN_LIBRARY=str(library))
        assert report.said("bundle", name)[0] == status
        assert ("was built with another plugin (SHA-256 111111111111…" in report.text) is (status == "wrong")


def test_a_stale_engine_is_told_where_there_is_no_gpu(equipped: Machine, bf16: Path) -> None:
    names = add_engines(bf16, chip=87, graph_sha256="0")
    report = equipped.doctor("--bundle", str(bf16))
    assert report.said("bundle", names[DECODER_GRAPH])[0] == "wrong"
    assert report.said("bundle", names[VISION_GRAPH]) == (
        "ok",
        "for trt 10.15.1.29, SM 87, 512 tokens; of this bundle",
        "",
    )


def test_the_recorded_set_is_tried_by_its_command(with_gpu: Machine, bf16: Path) -> None:
    """Without onnx, which that command needs, its own line says so."""
    report = with_gpu.doctor("--bundle", str(bf16))
    assert report.said("trials on the GPU", "engines")[:2] == (
        "missing",
        "the bundle has none for this GPU",
    )
    add_engines(bf16)
    report = with_gpu.doctor("--bundle", str(bf16))
    status, found, _ = report.said("trials on the GPU", "engines")
    assert (status, found) == ("wrong", "onnx is not installed; this installs it: pip install onnx")
    values = json.loads((bf16 / MANIFEST).read_text())
    values["files"] = {name: item for name, item in values["files"].items() if not name.startswith("recording/")}
    (bf16 / MANIFEST).write_text(json.dumps(values))
    report = with_gpu.doctor("--bundle", str(bf16))
    assert report.said("trials on the GPU", "engines")[::2] == (
        "missing",
        f"python -m export.recording --bundle {bf16}",
    )


def memory_of(folder: Path, available: int) -> Path:
    (folder / "proc").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: {8 << 20} kB\nMemAvailable: {available >> 10} kB\n")
    return folder


def fits(bundle: Path, gpu: Gpu, root: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in fit(Bundle(bundle), gpu, root)}


def test_memory(tiny_v1_bundle: Path, tmp_path: Path) -> None:
    """The weights' files and, of caches, two for each layer, count."""
    manifest = Bundle(tiny_v1_bundle).manifest
    weights = sum((tiny_v1_bundle / name).stat().st_size for name in WEIGHTS.values())
    lines = fits(tiny_v1_bundle, Gpu(), memory_of(tmp_path / "enough", weights + 1024))
    assert lines["main memory"].status == OK
    model = manifest.model
    caches = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 4 * 8192
    assert f"weights {weights / 1e6:.1f} MB, caches up to {caches / 1e6:.1f} MB for 8192" in lines["main memory"].found
    lines = fits(tiny_v1_bundle, Gpu(), memory_of(tmp_path / "little", weights - 1024))
    assert lines["main memory"].status == WRONG
    assert lines["main memory"].hinders("onnxruntime")


def test_memory_of_a_gpu(bf16: Path, tmp_path: Path) -> None:
    root = memory_of(tmp_path / "system", 6 << 30)
    weights = max((bf16 / name).stat().st_size for name in WEIGHTS.values())

    def line(free: int, jetson: str = "") -> Finding:
        return fits(bf16, Gpu(Device("a GPU", 89, free, 8 << 30), jetson=jetson), root)["GPU's memory"]

    assert line(weights).status == OK
    assert line(weights - 1).status == WRONG
    assert "a build, the weights at least; " in line(weights).found
    # A Jetson's GPU may have what the system would give back.
    assert line(weights - 1, jetson="an Orin").status == OK
    add_engines(bf16)
    model = Bundle(bf16).manifest.model
    needed = 8 + 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2 * 512
    assert (line(needed).status, line(needed - 1).status) == (OK, WRONG)
    assert "caches for 512 tokens" in line(needed).found


ONNXRUNTIME = """
__version__ = "1.31.1"

def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]

class InferenceSession:
    def __init__(self, model, options=None, **settings):
        pass

    def get_providers(self):
        return ["CPUExecutionProvider"]
"""
"""As onnxruntime-gpu is where it cannot load its provider: it says so in a log, and computes on the CPU."""


def test_a_provider_that_cannot_be_started(machine: Machine, folder: Path, gcc: str, tmp_path: Path) -> None:
    machine.install(*BASE)
    place = machine.packages / "onnxruntime"
    (place / "capi").mkdir(parents=True)
    (place / "__init__.py").write_text(ONNXRUNTIME)
    (tmp_path / "nothing.c").write_text("int nothing;\n")
    linked = ("-Wl,--no-as-needed", "-L.", "-l:libcublasLt.so.13")
    for library, words in (
        (tmp_path / "libcublasLt.so.13", ()),
        (place / "capi/libonnxruntime_providers_shared.so", ()),
        (place / "capi/libonnxruntime_providers_cuda.so", linked),
    ):
        subprocess.run([gcc, "-shared", "-fPIC", "nothing.c", "-o", library, *words], cwd=tmp_path, check=True)
    (tmp_path / "libcublasLt.so.13").unlink()
    report = machine.doctor("--bundle", str(folder), "--backend", "onnxruntime-cuda")
    assert report.said("backends", "onnxruntime-cuda")[:2] == (
        "missing",
        "onnxruntime 1.31.1 cannot start its CUDAExecutionProvider (libcublasLt.so.13: cannot open shared object file: "
        "No such file or directory): install the libraries of NVIDIA that it was built for",
    )
    assert report.finding("backends", "onnxruntime-cuda")["hinders"]
