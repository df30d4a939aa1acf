"""A bundle that is incomplete, altered or foreign is refused in one line that says how to mend it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

import runtime
from export.writer import BundleWriter
from runtime.backends import open_backend
from runtime.bundle.manifest import (
    DECODER_GRAPH,
    DECODER_WEIGHTS,
    FORMAT_VERSION,
    MANIFEST,
    REQUIRED_FILES,
    VISION_WEIGHTS,
    Manifest,
    Quantization,
)
from runtime.bundle.reader import Bundle
from runtime.console.files import put_in_place

QUANTIZED = {"mode": "w8a16", "form": "qdq", "experts": ["text"], "attention": False, "lm_head": True}


@pytest.fixture
def bundle(tiny_v1_bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_v1_bundle, folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def refused(folder: Path, *words: str, verify: bool = False) -> None:
    with pytest.raises(runtime.BundleError) as caught:
        runtime.load(folder, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 6000
    for word in words:
        assert word in message, message


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such bundle", "python -m export.onnx")


@pytest.mark.parametrize("wrong", [5, True, b"bundle", ["bundle"], {"bundle": 1}])
def test_what_is_no_path(wrong: object) -> None:
    with pytest.raises(runtime.BundleError, match="expected a bundle's folder as a str or Path, got "):
        runtime.load(wrong)  # type: ignore[arg-type] # as apps without types do


def test_something_else_than_a_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (MANIFEST, DECODER_GRAPH, "recording"):
        refused(bundle / part, f"{bundle / part} is a part of a bundle: name its folder, {bundle}")
    checkpoint = Path(__file__).resolve().parents[2] / "data/golden/tiny-v1/checkpoint"
    refused(checkpoint, f"is a checkpoint: make a bundle of it with: python -m export.onnx --ckpt {checkpoint} -o ")
    refused(checkpoint / "config.json", "config.json is a file: expected a bundle's folder")
    monkeypatch.chdir(tmp_path)
    refused(Path("OpenGVLab/Mono-InternVL-2B"), "export.onnx --ckpt OpenGVLab/Mono-InternVL-2B -o BUNDLE")
    refused(tmp_path / "a b", f"export.onnx --ckpt CKPT -o '{tmp_path}/a b'")


def test_no_manifest(tmp_path: Path) -> None:
    refused(tmp_path, "is not a bundle", MANIFEST)


def test_no_bundle_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONOEDGE_BUNDLE", raising=False)
    with pytest.raises(runtime.BundleError, match="MONOEDGE_BUNDLE"):
        runtime.load()


def test_bundle_from_the_environment(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONOEDGE_BUNDLE", str(bundle))
    assert runtime.load().bundle.folder == bundle


def test_manifest_with_a_byte_order_mark(bundle: Path) -> None:
    expected = Bundle(bundle).manifest
    (bundle / MANIFEST).write_bytes(b"\xef\xbb\xbf" + (bundle / MANIFEST).read_bytes())
    assert runtime.load(bundle).bundle.manifest == expected


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', "[" * 100_000, '{"format": ' + "1" * 5000])
def test_manifest_that_is_none(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    refused(bundle, MANIFEST)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format_version=FORMAT_VERSION + 1), ["format version 2", "update monoedge"]),
        (lambda m: m.update(format_version=0), ["format version 0", "export it again"]),
        (lambda m: m.update(precision="int3"), ["int3", "fp32"]),
        (lambda m: m["operators"].update(FusedMoE=2), ["version 2 of operator FusedMoE", "knows 1"]),
        (lambda m: m["operators"].update(Other=1), ["operator Other", "knows none"]),
        (lambda m: m["model"].pop("hidden_size"), ["hidden_size", "export the bundle again"]),
        (lambda m: m["model"].update(hidden_size="128"), ["hidden_size should be int"]),
        (lambda m: m["image"].update(max_tiles=0), ["max_tiles"]),
        (lambda m: m["files"].pop(DECODER_WEIGHTS), ["does not list decoder.weights"]),
        (lambda m: m["files"].update({"../secret": {"size": 1, "sha256": ""}}), ["../secret", "outside the bundle"]),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}}), ["/etc/passwd", "outside"]),
        (lambda m: m["files"].update({"new.bin": {"size": 1}}), ["sha256"]),
        *(
            (lambda m, name=name: m["files"].update({name: {"size": 1, "sha256": ""}}), ["outside the bundle"])
            for name in ("", ".", "a//b", "./decoder.onnx", "engines/", "a\\b", "a\0b", "a\nb", "a\u202eb")
        ),
        (lambda m: m["files"].update({"a" * 5000: {"size": 1, "sha256": ""}}), ["File name too long"]),
        (lambda m: m["files"].update({"new.bin": {"size": -1, "sha256": ""}}), ["size is out of range: -1"]),
        (lambda m: m["model"].update(hidden_size=0), ["hidden_size should be from 1 to 2,147,483,648, got 0"]),
        (lambda m: m["model"].update(max_length=1 << 40), ["max_length should be from 1 to"]),
        (lambda m: m["model"].update(max_length=True), ["max_length should be int, got True"]),
        (lambda m: m["model"].update(num_hidden_layers=1 << 31), ["num_hidden_layers should be from 1 to 1,024"]),
        (lambda m: m["image"].update(max_tiles=1 << 30), ["max_tiles must be at most 1000"]),
        (lambda m: m.update(opset=0), ["opset should be from 1"]),
        (lambda m: m["operators"].update(FusedMoE=True), ["version True of operator FusedMoE"]),
        (lambda m: m.update(precision="x" * 1_000_000), ["this runtime reads fp32"]),
        (lambda m: m["model"].update(vocab_size=778), ["777", "778"]),
        (lambda m: m.update(quantization=QUANTIZED | {"mode": "w4a4"}), ["'w4a4'", "w8a16, w8a8", "update monoedge"]),
        (lambda m: m.update(quantization=QUANTIZED | {"form": "gguf"}), ["'gguf'", "qdq and cpu", "update monoedge"]),
        (lambda m: m.update(quantization=QUANTIZED | {"experts": ["audio"]}), ["audio", "update monoedge"]),
        (lambda m: m.update(quantization=QUANTIZED | {"lm_head": "yes"}), ["lm_head should be bool, got 'yes'"]),
        (lambda m: m.update(quantization=QUANTIZED | {"kv_cache": 1}), ["kv_cache should be bool, got 1"]),
        (
            lambda m: m.update(quantization=QUANTIZED | {"kv_cache": True}),
            ["INT8 caches in form qdq", "update monoedge"],
        ),
        (lambda m: m.update(quantization=QUANTIZED | {"sparsity": 2}), ["quantization", "sparsity"]),
        (lambda m: m.update(quantization={"mode": "w8a16"}), ["quantization", "lm_head"]),
        (lambda m: m.update(quantization=[]), ["quantization", "list"]),
    ],
)
def test_manifest_values(bundle: Path, change: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    edit(bundle, change)
    refused(bundle, *words)


def test_what_is_quantized_is_read_and_written(bundle: Path) -> None:
    assert Bundle(bundle).manifest.quantization is None
    assert "quantization" not in Bundle(bundle).manifest.to_json()
    edit(bundle, lambda m: m.update(quantization=QUANTIZED))
    manifest = Bundle(bundle).manifest
    assert manifest.quantization == Quantization("w8a16", "qdq", ("text",), attention=False, lm_head=True)
    assert json.loads(manifest.to_json())["quantization"] == QUANTIZED
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_int8_caches_are_said_only_where_they_are(bundle: Path) -> None:
    """A runtime from before refuses keys that it does not know: bundles without such caches it can read."""
    values = QUANTIZED | {"form": "cpu", "kv_cache": True}
    edit(bundle, lambda m: m.update(quantization=values))
    manifest = Bundle(bundle).manifest
    assert manifest.quantization == Quantization("w8a16", "cpu", ("text",), False, True, kv_cache=True)
    assert json.loads(manifest.to_json())["quantization"] == values
    assert Manifest.from_json(manifest.to_json()) == manifest
    edit(bundle, lambda m: m.update(quantization=values | {"kv_cache": False}))
    assert "kv_cache" not in Bundle(bundle).manifest.to_json()


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, name, "is missing")


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_truncated_file(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    refused(bundle, name, f"{len(data) - 1:,}", f"{len(data):,}")


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_altered_file_is_found_by_full_verification(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, name, "was altered", verify=True)


@pytest.mark.parametrize("name", [MANIFEST, *REQUIRED_FILES])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    refused(bundle, name, "is not a file")


def linked(file: Path, target: Path) -> None:
    """Moves a file elsewhere, and leaves a link to it."""
    target.parent.mkdir(exist_ok=True)
    shutil.move(file, target)
    file.symlink_to(target)


@pytest.mark.parametrize("verify", [False, True])
def test_a_bundle_in_the_cache_of_the_hub_answers(bundle: Path, tmp_path: Path, verify: bool) -> None:
    """There every file is a link into ``blobs/``."""
    expected = runtime.load(bundle).session(prompt="Hello", max_new_tokens=4).text
    for number, file in enumerate(file for file in bundle.rglob("*") if file.is_file()):
        linked(file, tmp_path / f"blobs/{number:x}")
    assert runtime.load(bundle, verify=verify).session(prompt="Hello", max_new_tokens=4).text == expected


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_one_file_on_another_disk(bundle: Path, tmp_path: Path, name: str) -> None:
    """The owner may link to it, and the manifest holds; ONNX Runtime does not follow links to weights, and is told."""
    expected = Bundle(bundle).manifest
    linked(bundle / name, tmp_path / "disk/file")
    assert Bundle(bundle, verify=True).manifest == expected
    if name == DECODER_WEIGHTS:
        with pytest.raises(runtime.BackendError, match="does not follow the link") as caught:
            runtime.load(bundle)
        command = re.search(r"put a copy there \((.*?)\)", str(caught.value))
        assert command is not None
        subprocess.run(shlex.split(command[1]), check=True)
    runtime.load(bundle)
    with (tmp_path / "disk/file").open("ab") as file:
        file.write(b"x")
    if name != DECODER_WEIGHTS:
        refused(bundle, name, "bytes")


def test_a_link_to_something_else_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / DECODER_WEIGHTS).unlink()
    (bundle / DECODER_WEIGHTS).symlink_to(tmp_path / "nowhere")
    refused(bundle, DECODER_WEIGHTS, "is missing")


def test_weights_that_the_manifest_does_not_list(bundle: Path) -> None:
    """They would be computed with and not be hashed."""
    graph = onnx.load(bundle / DECODER_GRAPH, load_external_data=False)
    for item in graph.graph.initializer:
        for entry in item.external_data:
            if entry.key == "location":
                entry.value = "other.weights"
    shutil.copy(bundle / DECODER_WEIGHTS, bundle / "other.weights")
    data = graph.SerializeToString()
    (bundle / DECODER_GRAPH).write_bytes(data)
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, lambda m: m["files"].update({DECODER_GRAPH: record}))
    refused(bundle, "takes weights from 'other.weights'", verify=True)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("model", {"head_dim": 64}, ["past_key_values.0.key", "says 64"]),
        ("model", {"num_key_value_heads": 4}, ["past_key_values.0.key", "says 4"]),
        ("model", {"num_hidden_layers": 3}, ["has 8 caches", "says 6"]),
        ("model", {"num_hidden_layers": 1000}, ["has 8 caches", "says 2000"]),
        ("model", {"hidden_size": 64}, ["inputs_embeds", "says 64"]),
        ("image", {"tokens_per_tile": 64}, ["visual_embeds", "says 64"]),
        ("image", {"image_size": 224}, ["pixel_values", "says 224"]),
    ],
)
def test_facts_that_are_not_those_of_the_graphs(
    bundle: Path, section: str, changes: dict[str, int], words: list[str]
) -> None:
    edit(bundle, lambda m: m[section].update(changes))
    with pytest.raises(runtime.BundleError, match="export the bundle again") as caught:
        runtime.load(bundle).session(Image.new("RGB", (8, 8)), "What is it?", max_new_tokens=1).text  # noqa: B018
    for word in words:
        assert word in str(caught.value)


def test_engines_are_verified_where_they_are_there(bundle: Path) -> None:
    name, data = "engines/trt-sm87-fp32.decoder.plan", b"a plan"
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "graph": DECODER_GRAPH, "target": "trt"}
    record |= {"tensorrt": "10.3", "compute_capability": 87, "plugin_sha256": "", "graph_sha256": ""}
    record |= {"weights_sha256": "", "max_length": 512, "max_batch": 1}
    edit(bundle, lambda m: m.update(engines={name: record}))
    Bundle(bundle, verify=True)
    (bundle / "engines").mkdir()
    (bundle / name).write_bytes(data)
    Bundle(bundle, verify=True)
    (bundle / name).write_bytes(data[::-1])
    Bundle(bundle)
    refused(bundle, name, "was altered", verify=True)


# Replaced while it is open -------------------------------------------------------------------------------------------


@pytest.fixture
def other(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the same sizes and other weights, beside the first."""
    folder = tmp_path / "other"
    shutil.copytree(bundle, folder)
    for name in (DECODER_WEIGHTS, VISION_WEIGHTS):
        data = bytes((folder / name).stat().st_size)
        (folder / name).write_bytes(data)
        record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(folder, lambda m, name=name, record=record: m["files"].update({name: record}))
    edit(folder, lambda m: m.update(name="other"))
    return folder


def exchange(bundle: Path, other: Path) -> None:
    put_in_place(other, bundle, lambda path: True)


def test_graphs_that_are_opened_later_are_of_the_same_bundle(bundle: Path, other: Path) -> None:
    model = runtime.load(bundle)
    exchange(bundle, other)
    session = model.session(Image.new("RGB", (8, 8)), "What is it?", max_new_tokens=1)
    with pytest.raises(runtime.BundleError, match=r"was replaced while it was in use .*: load it again"):
        session.text  # noqa: B018
    # What needs nothing more of the files goes on.
    assert model.session(prompt="Hello", max_new_tokens=1).text is not None
    runtime.load(bundle).session(Image.new("RGB", (8, 8)), "What is it?", max_new_tokens=1).text  # noqa: B018


def test_a_file_that_is_written_again_in_place_is_noticed(bundle: Path, other: Path) -> None:
    model = runtime.load(bundle)
    (bundle / VISION_WEIGHTS).write_bytes((other / VISION_WEIGHTS).read_bytes())
    with pytest.raises(runtime.BundleError, match=r"vision\.weights is another"):
        model.session(Image.new("RGB", (8, 8)), "What is it?", max_new_tokens=1).text  # noqa: B018


def test_a_bundle_replaced_while_it_is_opened_is_read_again(bundle: Path, other: Path) -> None:
    """In the midst of hashing: the manifest of one is not taken for the files of the other."""
    seen: list[int] = []

    def progress(count: int) -> None:
        if not seen:
            exchange(bundle, other)
        seen.append(count)

    assert Bundle(bundle, verify=True, progress=progress).manifest.name == "other"


def test_a_bundle_replaced_between_manifest_and_graphs_is_noticed(bundle: Path, other: Path) -> None:
    opened = Bundle(bundle)
    backend = open_backend(None, opened, None)
    exchange(bundle, other)
    with pytest.raises(runtime.BundleError, match="was replaced"):
        open_backend(None, opened, None)
    with pytest.raises(runtime.BundleError, match="was replaced"):
        runtime.Model(opened, backend)


def test_verification_reports_all_bytes(bundle: Path) -> None:
    seen: list[int] = []
    opened = Bundle(bundle, verify=True, progress=seen.append)
    assert sum(seen) == sum(record.size for record in opened.manifest.files.values())


def test_writer_leaves_nothing_when_the_disk_fills(tmp_path: Path) -> None:
    def fill() -> None:
        with BundleWriter(tmp_path / "bundle") as writer:
            writer.write("part", b"x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(runtime.BundleError, match=r"No space left on device; nothing was kept"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_unknown_backend_and_bad_threads(bundle: Path) -> None:
    with pytest.raises(runtime.OptionError, match="'magic' is not known, expected one of: onnxruntime"):
        runtime.load(bundle, backend="magic")
    with pytest.raises(runtime.OptionError, match=r"backend \['onnxruntime'\] is not known"):
        runtime.load(bundle, backend=["onnxruntime"])  # type: ignore[arg-type] # as apps without types do
    with pytest.raises(runtime.OptionError, match="threads"):
        runtime.load(bundle, threads=0)
