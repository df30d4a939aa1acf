"""``python -m export.engine``: plans built by TensorRT for RTX, which takes no GPU, and everything that is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from export.engine import main
from export.engines import process as engine_process
from export.engines import store as engine_store
from export.engines.child import fraction
from export.engines.options import Options, check_bundle
from export.engines.plan import Plan, plans
from runtime.backends.cuda.driver import Device
from runtime.bundle.engines import plan_name, why_stale
from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, MANIFEST, VISION_GRAPH, VISION_WEIGHTS
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS, Target
from runtime.console.console import SILENT
from runtime.console.run import run
from runtime.errors import BackendError, BundleError, OptionError

ROOT = Path(__file__).resolve().parents[3]
RTX = TARGETS["trt-rtx"]
TRT = TARGETS["trt"]
GRAPHS = (DECODER_GRAPH, VISION_GRAPH)


@pytest.fixture
def rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every TensorRT is, as far as can be seen without importing it, and no GPU."""
    monkeypatch.setattr("runtime.bundle.targets.find_spec", lambda name: object())
    monkeypatch.setattr("runtime.backends.cuda.driver.find_device", lambda: None)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """Where only its name and hash count."""
    file = tmp_path / "plugin.so"
    file.write_bytes(b"plugin")
    return file


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        for file in sorted(folder.rglob("*"))
    }


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command is refused with."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            run(lambda: main([str(argument) for argument in arguments]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert not any("Traceback" in line for line in said)
    return said[-1]


# Built ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [86, 89, 120])
def test_builds(
    rtx: None, bf16_bundle: Path, library: Path, sm: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bf16_bundle, bundle)
    before = tree(bundle)
    lengths = ["--max-length", "512", "--max-batch", "2"]
    main(["--bundle", str(bundle), "--target", "trt-rtx", "--sm", str(sm), "--plugin", str(library), *lengths])
    manifest = Bundle(bundle, verify=True).manifest
    names = {graph: plan_name(graph, "trt-rtx", sm, "bf16") for graph in GRAPHS}
    assert set(manifest.engines) == set(names.values())
    plugin_sha256 = hashlib.sha256(library.read_bytes()).hexdigest()
    for graph, name in names.items():
        record, data = manifest.engines[name], (bundle / name).read_bytes()
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (record.graph, record.target, record.compute_capability) == (graph, "trt-rtx", sm)
        assert (record.max_length, record.max_batch) == (512, 2)
        assert record.tensorrt == engine_store.plan_version(bundle / name, RTX)
        assert record.plugin_sha256 == (plugin_sha256 if graph == DECODER_GRAPH else "")
        assert why_stale(name, record, manifest, plugin_sha256, bundle) is None
        assert (bundle / name).stat().st_mode & 0o777 == 0o644
        # Profiles share the weights: the largest is in the plan once.
        weights = max(weight_blobs(bundle, graph), key=len)
        assert data.count(weights) == 1
    after = tree(bundle)
    assert set(after) - set(before) == {"engines", *names.values()}
    assert {name for name in before if before[name] != after[name]} == {MANIFEST}
    said = capsys.readouterr().err
    assert "2 profiles, TensorRT for RTX 1." in said
    assert "not checked: what the engine answers, since there is no GPU here; on the device: python -m" in said


def weight_blobs(bundle: Path, graph: str) -> Iterator[bytes]:
    data = (bundle / (Path(graph).stem + ".weights")).read_bytes()
    for item in onnx.load(bundle / graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in item.external_data}
        # Tables of the example are zeros and ones in part, matrices of a module may be laid out otherwise.
        if "feed_forward" in item.name or graph == VISION_GRAPH:
            yield data[int(place["offset"]) :][: min(int(place["length"]), 4096)]


def test_as_a_user_runs_it(rtx: None, bundle: Path, library: Path) -> None:
    command = [sys.executable, "-m", "export.engine", "--bundle", bundle, "--target", "trt-rtx", "--sm", "89"]
    environment = {**os.environ, "MONOEDGE_PLUGIN_LIBRARY": str(library)}
    for words in ("2 profiles", "exists already (up to date): add --overwrite"):
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert words in result.stderr
        assert result.returncode == (0 if words == "2 profiles" else 2)
        assert result.stdout == ""
    # Another target's engines stay.
    main(["--bundle", str(bundle), "--target", "trt-rtx", "--sm", "80", "--max-length", "64", "--plugin", str(library)])
    manifest = Bundle(bundle).manifest
    assert len(manifest.engines) == 4
    assert {record.max_length for record in manifest.engines.values()} == {64, 8192}


def test_interrupted_build_leaves_nothing(rtx: None, bundle: Path, library: Path) -> None:
    before = tree(bundle)
    command = [sys.executable, "-m", "export.engine", "--bundle", bundle, "--target", "trt-rtx", "--sm", "89"]
    for number, code in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)):
        process = subprocess.Popen([*command, "--plugin", library], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not list(bundle.glob("engines/.plans.partial-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
        assert process.returncode == code
        assert "Traceback" not in stderr
        assert tree(bundle) == before


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "trt-rtx"], "there is no GPU here: name the one to build for with --sm, one of 80, 86, 89"),
        (["--target", "trt-rtx", "--sm", "87"], "does not build for SM 87, only for --sm 80, 86, 89, 120, 121"),
        (["--target", "trt-rtx", "--sm", "75"], "the plugin has no kernels for SM 75, only for SM 80 and later"),
        (["--target", "trt-rtx", "--sm", "89", "--max-length", "9999"], "--max-length 9999 does not fit: the bundle"),
        (["--target", "trt-rtx", "--sm", "89", "--max-length", "0"], "--max-length 0 does not fit"),
        (
            ["--target", "trt-rtx", "--sm", "89", "--max-batch", "0"],
            "--max-batch must be a whole number from 1 to 4096",
        ),
        (["--target", "trt-rtx", "--sm", "89", "--max-batch", "9" * 30], "--max-batch must be a whole number from 1"),
        (["--target", "trt", "--print-trtexec", "--sm", "9999"], "without its dot"),
        (["--target", "trt-rtx", "--sm", "89", "--plugin", "/no/lib.so"], "--plugin /no/lib.so: no such file"),
        (["--target", "trt-rtx", "--sm", "89", "--timing-cache", "x"], "--timing-cache is for builds with --target"),
        (["--target", "trt-rtx", "--sm", "89", "--print-trtexec"], "leave out --print-trtexec"),
        (["--target", "trt"], "there is none here: run this on the device, print the commands for it"),
        (["--target", "trt", "--print-trtexec"], "name the device's with --sm, as 87 for Orin"),
        (["--target", "trt", "--print-trtexec", "--sm", "8"], "without its dot"),
        (["--target", "trt", "--print-trtexec", "--sm", "72"], "the plugin has no kernels for SM 72, only for SM 80"),
        (["--target", "trt", "--sm", "75", "--register", "x.plan"], "no kernels for SM 75, only for SM 80 and later"),
        (["--target", "trt", "--sm", "87", "--print-trtexec", "--register", "x"], "--register takes plans that are"),
        (["--target", "trt", "--sm", "87", "--register", "/no/x.decoder.plan"], "/no/x.decoder.plan cannot be read"),
    ],
)
def test_options(
    installed: None,
    bundle: Path,
    plugin: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(bundle)
    given = [] if "--plugin" in arguments else ["--plugin", plugin]
    assert words in refusal(capsys, "--bundle", bundle, *arguments, *given)
    assert tree(bundle) == before


def test_a_plugin_library_for_another_gpu(
    installed: None,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused where an engine is built, registered or checked, and where commands are printed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed, which compiles the library")
    source, library = tmp_path / "code.cu", tmp_path / "orin.so"
    source.write_text("__global__ void f(float* x) { *x = 1; }\nvoid g(float* x) { f<<<1, 1>>>(x); }\n")
    command = [nvcc, "-shared", "-Xcompiler=-fPIC", "-gencode=arch=compute_87,code=sm_87", source, "-o", library]
    subprocess.run(command, check=True)
    before = tree(bundle)
    expected = f"{library} has no code for SM 89, only for SM 87: build it with: monoedge plugin --arch 89 -o {library}"
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
    for named in (["--plugin", library], []):
        for arguments in (["trt-rtx"], ["trt", "--register", "x.decoder.plan"]):
            line = refusal(capsys, "--bundle", bundle, "--sm", 89, *named, "--target", *arguments)
            assert expected in line
    line = refusal(capsys, "--bundle", bundle, "--sm", 89, "--plugin", library, "--target", "trt", "--print-trtexec")
    assert expected in line
    monkeypatch.setattr("runtime.backends.cuda.driver.find_device", lambda: Device("RTX 4000 Ada", 89, 13, 0))
    assert expected in refusal(capsys, "--bundle", bundle, "--check")
    assert tree(bundle) == before


def test_no_plugin_library(
    installed: None, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", "/no/lib.so")
    line = refusal(capsys, "--bundle", bundle, "--target", "trt-rtx", "--sm", "89")
    assert "MONOEDGE_PLUGIN_LIBRARY is /no/lib.so, which is no file" in line
    assert "monoedge plugin" in line


@pytest.mark.parametrize(
    ("target", "remedy"), [("trt", "comes with JetPack"), ("trt-rtx", "pip install tensorrt-rtx-cu13==")]
)
def test_no_tensorrt(
    bundle: Path,
    target: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    hidden = TARGETS[target].module
    monkeypatch.setattr("runtime.bundle.targets.find_spec", lambda name: None if name == hidden else find(name))
    before = tree(bundle)
    line = refusal(capsys, "--bundle", bundle, "--target", target, "--sm", "89")
    assert f"{hidden} is not installed" in line
    assert remedy in line
    assert tree(bundle) == before


def test_fp32(tiny_v1_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--bundle", tiny_v1_bundle, "--target", "trt-rtx", "--sm", "89")
    assert "the bundle is fp32, and TensorRT's fused attention has no fp32 kernel: export it again with --dtype" in line
    assert not (tiny_v1_bundle / "engines").exists()


def test_other_operators(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    for operators, words in (({"FusedMoE": 2}, "the plugin has 1"), ({"Other": 1}, "the plugin has none")):
        with pytest.raises(BundleError, match=words):
            check_bundle(replace(manifest, operators=operators))


def test_failed_build_keeps_what_was_there(
    rtx: None, bundle: Path, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = plan_name(DECODER_GRAPH, "trt-rtx", 89, "bf16")
    (bundle / "engines").mkdir()
    (bundle / name).write_bytes(b"older")
    before = tree(bundle)
    options = ["--bundle", bundle, "--target", "trt-rtx", "--sm", "89", "--plugin", plugin, "--overwrite"]
    line = refusal(capsys, *options)
    assert f"decoder.onnx: TensorRT for RTX 1.7.1.116: cannot load the plugin library {plugin}" in line
    assert tree(bundle) == before


def test_graph_that_is_none(installed: None, bundle: Path, plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bundle / DECODER_GRAPH
    file.write_bytes(b"\xff" * file.stat().st_size)
    line = refusal(capsys, "--bundle", bundle, "--target", "trt-rtx", "--sm", "89", "--plugin", plugin)
    assert f"{file} cannot be read" in line


def test_bundle_that_cannot_be_written(
    installed: None, bundle: Path, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "engines").write_bytes(b"")
    line = refusal(capsys, "--bundle", bundle, "--target", "trt-rtx", "--sm", "89", "--plugin", plugin)
    assert "engines cannot be written (File exists): copy the bundle elsewhere" in line


def test_disk_without_room(
    installed: None,
    bundle: Path,
    plugin: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engine_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_500_000))
    before = tree(bundle)
    line = refusal(capsys, "--bundle", bundle, "--target", "trt-rtx", "--sm", "89", "--plugin", plugin)
    weights = sum((bundle / name).stat().st_size for name in (DECODER_WEIGHTS, VISION_WEIGHTS))
    assert f"the plans need up to {(weights + (64 << 20)) / 1e6:.1f} MB" in line
    assert "has 1.5 MB free" in line
    assert tree(bundle) == before


# What the process that builds says ------------------------------------------------------------------------------------


Change = Callable[[Plan], Plan]


def other_operator(plan: Plan) -> Plan:
    plan.model.graph.node[0].op_type = "NotAnOperator"
    return plan


def swapped_weights(plan: Plan) -> Plan:
    node = next(node for node in plan.model.graph.node if node.op_type == "FusedMoE")
    node.input[2], node.input[3] = node.input[3], node.input[2]
    return plan


def no_room_for_the_prompt(plan: Plan) -> Plan:
    prefill, decode = plan.profiles
    shapes = prefill["inputs_embeds"]
    longer = shapes._replace(optimum=(1, 600, shapes.maximum[2]), maximum=(1, 600, shapes.maximum[2]))
    return replace(plan, profiles=({**prefill, "inputs_embeds": longer}, decode))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_operator, "1.7.1.116: its ONNX parser does not have NotAnOperator: 1.7.1 has all"),
        (swapped_weights, "[monoedge] layers.0.feed_forward/FusedMoE: text_gate_up must be [2*inter, in]"),
        (no_room_for_the_prompt, "could not build the plan: IBuilder::buildSerializedNetwork: "),
    ],
)
def test_told_in_one_line(rtx: None, bundle: Path, library: Path, change: Change, words: str, tmp_path: Path) -> None:
    decoder, _ = plans(Bundle(bundle), Options(RTX, 89, 512, 1))
    with pytest.raises(BackendError) as caught:
        build_one(change(decoder), bundle, library, tmp_path)
    message = str(caught.value)
    assert message.startswith("decoder.onnx: TensorRT for RTX 1.7.1.116: ")
    assert words in message
    # What was so before the library was loaded is no reason.
    assert "Cannot find plugin" not in message
    assert "\n" not in message


def test_process_that_aborts(
    rtx: None, bundle: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the name that its parser asks for, TensorRT for RTX 1.7.1 ends the process."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    decoder, _ = plans(Bundle(bundle), Options(RTX, 89, 512, 1))
    with pytest.raises(BackendError, match="the process that builds with TensorRT for RTX ended with SIGABRT: "):
        build_one(decoder, bundle, library, tmp_path, replace(RTX, link=None))


def test_a_bad_timing_cache_is_told_before_the_build(bundle: Path, tmp_path: Path) -> None:
    command = ["--bundle", str(bundle), "--target", "trt", "--timing-cache"]
    with pytest.raises(OptionError, match=f"--timing-cache: {tmp_path} is a folder, expected the file to write"):
        main([*command, str(tmp_path)])
    with pytest.raises(OptionError, match=f"--timing-cache: {tmp_path}/nowhere is not a folder: make it, or choose"):
        main([*command, str(tmp_path / "nowhere/trt.timing")])


def test_timing_cache_is_kept(rtx: None, bundle: Path, library: Path, tmp_path: Path) -> None:
    _, vision = plans(Bundle(bundle), Options(RTX, 89, 512, 1))
    cache = tmp_path / "caches/trt.timing"
    build_one(vision, bundle, library, tmp_path, cache=cache)
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    assert build_one(vision, bundle, library, tmp_path, cache=cache) == "1.7.1.116"


def build_one(
    plan: Plan, bundle: Path, library: Path, folder: Path, target: Target = RTX, cache: Path | None = None
) -> str:
    options = Options(target, 89, 512, plugin=library, timing_cache=cache)
    _, version = engine_process.build_plan(plan, options, bundle / plan.graph, folder / "out.plan", SILENT)
    return version


def test_progress() -> None:
    assert fraction([]) == 0
    assert fraction([[1, 4], [1, 2]]) == 0.375
    assert fraction([[3, 4], [2, 2], [0, 5]]) == 1
