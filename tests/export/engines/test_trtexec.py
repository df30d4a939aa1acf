"""Commands for ``trtexec``, the graphs that it is given, and the plans that come back from it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export.engine import main
from export.engines import process as engine_process
from export.engines import store as engine_store
from export.engines.options import Options
from export.engines.plan import PREFILL_CHUNK, InputShapes, decoder_profiles, input_shapes, plans, vision_profile
from export.passes.nodes import load_graph
from runtime.bundle.engines import plan_name
from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, VISION_GRAPH, VISION_WEIGHTS
from runtime.bundle.reader import Bundle
from runtime.bundle.targets import TARGETS
from runtime.console.console import SILENT
from runtime.errors import BundleError, OptionError

ROOT = Path(__file__).resolve().parents[3]
HEAD = b"ftrt" + bytes(20) + bytes([10, 15, 1, 29])
"""What a plan of TensorRT 10.15.1.29 begins with."""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "my plugin.so"
    file.write_bytes(b"plugin")
    return file


def engine(bundle: Path, *arguments: object) -> None:
    main([str(part) for part in ("--bundle", bundle, "--target", "trt", "--sm", 87, *arguments)])


def commands(text: str) -> list[list[str]]:
    """The printed commands as a shell would split them."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def shapes_of(command: list[str]) -> list[dict[str, InputShapes]]:
    """Shapes by profile, in the order in which trtexec reads them."""
    found: list[dict[str, list[tuple[int, ...]]]] = []
    for argument in command:
        if match := re.fullmatch(r"--profile=(\d+)", argument):
            assert int(match[1]) == len(found)
            found.append({})
        elif match := re.fullmatch(r"--(?:min|opt|max)Shapes=(.+)", argument):
            for item in match[1].split(","):
                name, _, shape = item.rpartition(":")
                found[-1].setdefault(name, []).append(tuple(map(int, shape.split("x"))))
    return [{name: InputShapes(*shapes) for name, shapes in profile.items()} for profile in found]


def test_printed_commands(bundle: Path, plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine(bundle, "--print-trtexec", "--max-length", 2048, "--max-batch", 2, "--plugin", plugin)
    write, make, decoder, vision, register = commands(capsys.readouterr().out)
    names = {graph: str(bundle / plan_name(graph, "trt", 87, "bf16")) for graph in (DECODER_GRAPH, VISION_GRAPH)}
    given = ["--bundle", str(bundle), "--target", "trt", "--sm", "87", "--max-length", "2048", "--max-batch", "2"]
    assert write == ["python", "-m", "export.engine", *given, "--write-onnx", "bundle-onnx"]
    assert make == ["mkdir", "-p", str(bundle / "engines")]
    assert decoder[:6] == [
        "trtexec",
        "--onnx=bundle-onnx/decoder.onnx",
        f"--saveEngine={names[DECODER_GRAPH]}",
        f"--staticPlugins={plugin}",
        "--stronglyTyped",
        "--skipInference",
    ]
    assert vision[:5] == [
        "trtexec",
        "--onnx=bundle-onnx/vision.onnx",
        f"--saveEngine={names[VISION_GRAPH]}",
        "--stronglyTyped",
        "--skipInference",
    ]
    assert register[3:] == [*given, "--register", *names.values(), "--plugin", str(plugin)]

    opened = Bundle(bundle)
    model = load_graph(opened, DECODER_GRAPH)
    fixed = [
        {**profile, "capacity": profile["batch"].only(2048)} for profile in decoder_profiles(2048, PREFILL_CHUNK, 2)
    ]
    assert shapes_of(decoder) == [input_shapes(model, profile) for profile in fixed]
    image = opened.manifest.image
    tiles = vision_profile(image.max_tiles + 1)
    assert shapes_of(vision) == [input_shapes(load_graph(opened, VISION_GRAPH), tiles)]


@pytest.mark.parametrize("here", ["nothing", "code for another GPU"])
def test_without_a_plugin_here_the_variable_names_it(
    bundle: Path, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "lib.so"
    if here != "nothing":  # an empty cubin for SM 89, as nvcc lays it out
        cubin = struct.pack("<HHIQ12xI32x", 2, 0x101, 64, 0, 89)
        library.write_bytes(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(cubin)) + cubin)
    monkeypatch.setenv("MONOEDGE_PLUGIN_LIBRARY", str(library))
    engine(bundle, "--print-trtexec")
    printed = capsys.readouterr().out
    assert '--staticPlugins="$MONOEDGE_PLUGIN_LIBRARY"' in printed
    assert "--plugin" not in printed


def test_printed_commands_run(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one script, with a stand-in for trtexec that writes something like a plan."""
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"plugin")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    trtexec = bin_ / "trtexec"
    trtexec.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "options = dict(item.partition('=')[::2] for item in sys.argv[1:])\n"
        "open(options['--onnx'], 'rb').close()\n"
        f"open(options['--saveEngine'], 'wb').write({HEAD!r})\n"
    )
    trtexec.chmod(0o755)
    engine(bundle, "--print-trtexec", "--max-length", 256, "--plugin", plugin)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", capsys.readouterr().out],
        cwd=tmp_path,
        env={
            "PATH": f"{bin_}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "MONOEDGE_PLUGIN_LIBRARY": str(plugin),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    engines = Bundle(bundle).manifest.engines
    assert {(record.tensorrt, record.compute_capability, record.max_length) for record in engines.values()} == {
        ("10.15.1.29", 87, 256)
    }
    assert len(engines) == 2
    assert [file.name for file in sorted(bundle.glob("engines/*"))] == [Path(name).name for name in engines]


def test_written_graphs(bundle: Path, plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "for trtexec"
    engine(bundle, "--write-onnx", folder, "--max-length", 512, "--plugin", plugin)
    assert capsys.readouterr().out == ""
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [DECODER_GRAPH, DECODER_WEIGHTS, VISION_GRAPH, VISION_WEIGHTS]
    )
    model = onnx.load(folder / DECODER_GRAPH, load_external_data=False)
    cache = next(value for value in model.graph.input if value.name == "past_key_values.0.key")
    assert cache.type.tensor_type.shape.dim[2].dim_value == 512
    assert (folder / DECODER_WEIGHTS).samefile(bundle / DECODER_WEIGHTS)
    assert Bundle(bundle, verify=True).manifest.engines == {}

    with pytest.raises(OptionError, match="exists already: choose another folder, or add --overwrite"):
        engine(bundle, "--write-onnx", folder)
    engine(bundle, "--write-onnx", folder, "--max-length", 64, "--overwrite")
    with pytest.raises(OptionError, match="is the bundle itself"):
        engine(bundle, "--write-onnx", bundle, "--overwrite")
    Bundle(bundle, verify=True)


def test_tensorrt_reads_the_written_graphs(bundle: Path, library: Path, tmp_path: Path) -> None:
    """The parser of TensorRT for RTX finds the weights through the links."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    folder = tmp_path / "onnx"
    engine(bundle, "--write-onnx", folder, "--max-length", 128)
    options = Options(TARGETS["trt-rtx"], 89, 128, plugin=library)
    decoder, _ = plans(Bundle(bundle), options)
    decoder.model.CopyFrom(onnx.load(folder / DECODER_GRAPH, load_external_data=False))
    record, _ = engine_process.build_plan(decoder, options, folder / DECODER_GRAPH, tmp_path / "out", SILENT)
    assert record.size > (bundle / DECODER_WEIGHTS).stat().st_size


# Registered -----------------------------------------------------------------------------------------------------------


def test_registered_from_elsewhere(
    bundle: Path, plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "mine.decoder.plan"
    plan.write_bytes(HEAD + b"and so on")
    engine(bundle, "--register", plan, "--max-length", 700, "--plugin", plugin)
    ((name, record),) = Bundle(bundle).manifest.engines.items()
    assert name == plan_name(DECODER_GRAPH, "trt", 87, "bf16")
    assert (bundle / name).read_bytes() == plan.read_bytes()
    assert (record.tensorrt, record.max_length, record.max_batch) == ("10.15.1.29", 700, 1)
    assert record.plugin_sha256 == hashlib.sha256(b"plugin").hexdigest()
    said = capsys.readouterr().err
    assert "its header says TensorRT 10.15.1.29" in said
    assert "taken on trust: SM 87, 700 tokens, batch 1, built from decoder.onnx as it is now, with " in said
    assert "not checked: what the engine answers, since there is no GPU here" in said

    with pytest.raises(BundleError, match=r"exists already \(up to date\): add --overwrite"):
        engine(bundle, "--register", plan, "--plugin", plugin)
    plugin.write_bytes(b"built again")
    with pytest.raises(BundleError, match=r"exists already \(stale: .* was built with another plugin"):
        engine(bundle, "--register", plan, "--plugin", plugin)
    engine(bundle, "--register", plan, "--plugin", plugin, "--overwrite")
    # In its place already, it needs no leave.
    engine(bundle, "--register", bundle / name, "--plugin", plugin, "--max-length", 600)
    assert Bundle(bundle).manifest.engines[name].max_length == 600


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.decoder.plan", b"short", "is not a plan that TensorRT wrote"),
        ("x.decoder.plan", b"onnx" + bytes(60), "is not a plan that TensorRT wrote"),
        ("x.decoder.plan", b"vtrt" + bytes(60), "is a plan of TensorRT for RTX: name it with --target trt-rtx"),
        ("x.plan", HEAD, r"which graph is it\? Its name should end in \.decoder\.plan or \.vision\.plan"),
    ],
)
def test_not_registered(bundle: Path, plugin: Path, tmp_path: Path, name: str, data: bytes, words: str) -> None:
    plan = tmp_path / name
    plan.write_bytes(data)
    with pytest.raises((BundleError, OptionError), match=words):
        engine(bundle, "--register", plan, "--plugin", plugin)
    with pytest.raises((BundleError, OptionError)):
        engine(bundle, "--register", plan, plan, "--plugin", plugin)
    assert not (bundle / "engines").exists()
    assert Bundle(bundle).manifest.engines == {}


def test_interrupted_registration(bundle: Path, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "x.vision.plan"
    plan.write_bytes(HEAD)
    monkeypatch.setattr(engine_store, "put_in_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine(bundle, "--register", plan, "--plugin", plugin)
    assert not (bundle / "engines").exists()
