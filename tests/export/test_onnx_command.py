"""``python -m export.onnx`` as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

import runtime
from export.onnx import main
from plugins_trt.schema import DOMAIN, OPERATORS, VERSION
from runtime.backends.graph import PAST, PRESENT, cache_names
from runtime.bundle.manifest import DECODER_GRAPH, EMBEDDINGS, MANIFEST
from runtime.bundle.reader import Bundle
from runtime.errors import MonoedgeError

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINT = ROOT / "tests/data/golden/tiny-v1/checkpoint"
STANDARD_OPERATORS = {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}


def export(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; most tests call ``main`` instead, which spares the imports."""
    command = [sys.executable, "-m", "export.onnx", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def half_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    for dtype in ("fp16", "bf16"):
        main(["--ckpt", str(CHECKPOINT), "-o", str(folder / dtype), "--dtype", dtype])
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_same_checkpoint_gives_the_same_bytes(tiny_v1_bundle: Path, tmp_path: Path) -> None:
    result = export("--ckpt", CHECKPOINT, "-o", tmp_path / "again", PYTHONHASHSEED="7")
    assert result.returncode == 0, result.stderr
    assert hashes(tmp_path / "again") == hashes(tiny_v1_bundle)


def test_help_teaches() -> None:
    result = export("--help")
    assert result.returncode == 0
    for word in ("--ckpt", "--dtype", "--max-length", "--overwrite", "examples:"):
        assert word in result.stdout


def test_graph_has_the_promised_nodes(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / DECODER_GRAPH, load_external_data=False)
    onnx.checker.check_model(str(tiny_bundle / DECODER_GRAPH))
    assert {item.domain: item.version for item in model.opset_import} == {"": 24, DOMAIN: VERSION}
    facts = Bundle(tiny_bundle).manifest.model
    custom = [node for node in model.graph.node if node.domain == DOMAIN]
    per_layer = 1 if facts.version == "1.0" else 3
    assert len(custom) == per_layer * facts.num_hidden_layers
    for node in custom:
        attributes = {item.name: item.s.decode() for item in node.attribute}
        assert attributes == OPERATORS[0].attributes
    assert {node.op_type for node in model.graph.node} >= STANDARD_OPERATORS
    assert {function.name for function in model.functions} == {node.op_type for node in custom}
    names = ["inputs_embeds", "visual_mask", "position_ids", "write_indices"]
    assert [item.name for item in model.graph.input] == names + [
        PAST + name for name in cache_names(facts.num_hidden_layers)
    ]
    assert [item.name for item in model.graph.output] == [
        "logits",
        *(PRESENT + name for name in cache_names(facts.num_hidden_layers)),
    ]
    # Nothing of the exporting machine, and no weight inside the graph file.
    assert str(ROOT).encode() not in model.SerializeToString()
    assert all(item.data_location == onnx.TensorProto.EXTERNAL for item in model.graph.initializer)
    for item in model.graph.initializer:
        (offset,) = [int(entry.value) for entry in item.external_data if entry.key == "offset"]
        assert offset % 4096 == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(dtype: str, half_bundles: Path) -> None:
    """The half-precision graphs by ONNX's reference evaluator, against the official fp32 logits."""
    bundle = Bundle(half_bundles / dtype, verify=True)
    golden = load_file(CHECKPOINT.parent / "text_only.safetensors")
    evaluator = ReferenceEvaluator(str(bundle.path(DECODER_GRAPH)))
    element = {
        item.name: onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
        for item in evaluator.proto_.graph.input
    }["inputs_embeds"]
    facts, length = bundle.manifest.model, len(golden["input_ids"])
    caches = {
        name: np.zeros((1, facts.num_key_value_heads, length, facts.head_dim), element)
        for name in [PAST + name for name in cache_names(facts.num_hidden_layers)]
    }
    logits = evaluator.run(
        ["logits"],
        {
            "inputs_embeds": np.array(bundle.embeddings()[golden["input_ids"]]).view(element)[None],
            "visual_mask": np.zeros((1, length), bool),
            "position_ids": np.arange(length)[None],
            "write_indices": np.zeros(1, np.int64),
            **caches,
        },
    )[0]
    assert logits.dtype == np.float32
    # The official code's own bf16 logits differ from fp32 by up to 0.29; the reference evaluator adds a softmax
    # in bf16, where TensorRT and the official code have float32.
    np.testing.assert_allclose(logits[0], golden["prefill_last_logits"], rtol=0, atol=0.5 if dtype == "bf16" else 0.05)


def test_float16_bundle_answers_and_bfloat16_is_refused_on_a_cpu(half_bundles: Path) -> None:
    golden = load_file(CHECKPOINT.parent / "text_only.safetensors")
    session = runtime.load(half_bundles / "fp16").session(
        prompt="Hello, who are you?", max_new_tokens=1, return_logits=True
    )
    assert session.text is not None
    assert session.logits is not None
    np.testing.assert_allclose(session.logits[0], golden["prefill_last_logits"], rtol=0, atol=0.05)
    with pytest.raises(runtime.BackendError, match="--dtype fp32"):
        runtime.load(half_bundles / "bf16")


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ([], 8192),
        (["--target", "trt10.3"], 8192),
        (["--target", "cpu"], 8192),
        (["--dtype", "fp16"], 8192),
        (["--max-length", "100"], 100),
        (["--dtype", "bf16"], 8192),
        (["--dtype", "bf16", "--target", "trt10.3"], 8192),
    ],
)
def test_the_command_that_is_told_works(
    options: list[str], length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chat answers; for engines, which need TensorRT, everything before the build succeeds."""
    bundle = tmp_path / "my bundle"
    main(["--ckpt", str(CHECKPOINT), "-o", str(bundle), *options])
    said = capsys.readouterr().err
    python, *command = shlex.split(said.splitlines()[-1])
    assert python == "python"
    if "bf16" in options:
        assert command[:2] == ["-m", "export.engine"]
        assert command[-1] == ("trt10.3" if "trt10.3" in options else "trt")
        command += ["--print-trtexec", "--sm", "87"]
    else:
        command = [str(ROOT / "examples/shapes/pictures/p000.png") if word == "PHOTO" else word for word in command]
        command += ["--max-new-tokens", "2"]
    assert ("PHOTO" in said) == ("bf16" not in options and length > 100)
    assert ("--max-length 100 is for text alone" in said) == (length == 100)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_shortest_length_that_holds_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "short"), "--max-length", "99"])
    least = int(re.search(r"a question about a picture needs (\d+) at least", capsys.readouterr().err)[1])
    picture = np.zeros((448, 448, 3), np.uint8)
    for length in (least - 1, least):
        bundle = tmp_path / str(length)
        main(["--ckpt", str(CHECKPOINT), "-o", str(bundle), "--max-length", str(length)])
        assert ("is for text alone" in capsys.readouterr().err) == (length < least)
        model = runtime.load(bundle)
        if length < least:
            with pytest.raises(runtime.PromptError, match=f"exported with --max-length {length}"):
                model.session(picture, "?", max_new_tokens=1)
        else:
            assert model.session(picture, "?", max_new_tokens=1).text is not None


def test_overwrites_only_when_told(tmp_path: Path, tiny_v1_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bundle"
    shutil.copytree(tiny_v1_bundle, target)
    before = hashes(target)
    with pytest.raises(MonoedgeError, match="exists already"):
        main(["--ckpt", str(CHECKPOINT), "-o", str(target)])
    assert hashes(target) == before

    main(["--ckpt", str(CHECKPOINT), "-o", str(target), "--max-length", "700", "--overwrite"])
    assert Bundle(target, verify=True).manifest.model.max_length == 700
    said = capsys.readouterr().err
    assert "onnx.checker and strict shape inference pass" in said
    assert "a forward pass differs from PyTorch by" in said
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bundle"]


def test_overwrite_spares_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_bytes(b"dear")
    with pytest.raises(MonoedgeError, match="is not a bundle"):
        main(["--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "photos"), "--overwrite"])
    assert (tmp_path / "photos/holiday.jpg").read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ckpt", "/nowhere/at all"], ["no such folder"]),
        (["--ckpt", CHECKPOINT, "--max-length", "0"], ["--max-length 0", "32768"]),
        (["--ckpt", CHECKPOINT, "--max-length", "99999"], ["--max-length 99999", "32768"]),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    result = export(*arguments, "-o", tmp_path / "bundle")
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last
    assert list(tmp_path.iterdir()) == []


def test_damaged_values_leave_nothing(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    file.write_bytes(data)
    with pytest.raises(MonoedgeError, match="holds NaN or infinite values"):
        main(["--ckpt", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "bundle")])
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_float16_overflow_names_the_layer(tmp_path: Path) -> None:
    """Weights within float16's range whose products are not."""
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model.safetensors"
    tensors = load_file(file)
    for name in ("w1", "w2", "w3"):
        tensors[f"language_model.model.layers.2.feed_forward_ve.{name}.weight"] *= 4000
    save_file(tensors, file)
    with pytest.raises(MonoedgeError, match=r"decoder, layers\.2\.feed_forward: activations overflow in fp16.*bf16"):
        main(["--ckpt", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "bundle"), "--dtype", "fp16"])
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_disk_without_room(small_disk: Path) -> None:
    with pytest.raises(MonoedgeError, match=r"needs .* MB, .* MB free"):
        main(["--ckpt", str(CHECKPOINT), "-o", str(small_disk / "bundle")])
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_export_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.onnx", "--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "bundle")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_export_leaves_no_bundle(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export.onnx", "--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "bundle")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.iterdir()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    for item in tmp_path.iterdir():
        assert item.name.startswith(".bundle.partial-")
        assert not (item / MANIFEST).exists()
        with pytest.raises(runtime.BundleError, match="is not a bundle"):
            Bundle(item)
    main(["--ckpt", str(CHECKPOINT), "-o", str(tmp_path / "bundle")])
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_manifest_tells_the_files(tiny_v1_bundle: Path) -> None:
    manifest = json.loads((tiny_v1_bundle / MANIFEST).read_text())
    on_disk = set(hashes(tiny_v1_bundle)) - {MANIFEST}
    assert set(manifest["files"]) == on_disk
    config = json.loads((CHECKPOINT / "config.json").read_text())["llm_config"]
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "intermediate_size"):
        assert manifest["model"][key] == config[key]
    assert manifest["files"][EMBEDDINGS]["size"] == 4 * config["vocab_size"] * config["hidden_size"]
