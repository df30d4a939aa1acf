"""Engines in the manifest: read, refused, and recognised when they are stale."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.bundle.engines import WEIGHTS, plan_name, rebuild_command, why_stale
from runtime.bundle.manifest import DECODER_GRAPH, DECODER_WEIGHTS, MANIFEST, VISION_GRAPH, EngineRecord, Manifest
from runtime.bundle.reader import Bundle

NAME = "engines/trt-rtx-sm89-bf16.decoder.plan"


def record_of(manifest: Manifest, graph: str = DECODER_GRAPH) -> EngineRecord:
    return EngineRecord(
        size=3,
        sha256="abc",
        graph=graph,
        target="trt-rtx",
        tensorrt="1.7.1.116",
        compute_capability=89,
        plugin_sha256="1" * 64 if graph == DECODER_GRAPH else "",
        graph_sha256=manifest.files[graph].sha256,
        weights_sha256=manifest.files[WEIGHTS[graph]].sha256,
        max_length=512,
        max_batch=2,
    )


@pytest.fixture
def manifest(tiny_v1_bundle: Path) -> Manifest:
    return Bundle(tiny_v1_bundle).manifest


def test_names() -> None:
    assert plan_name(DECODER_GRAPH, "trt-rtx", 89, "bf16") == NAME
    assert plan_name(VISION_GRAPH, "trt", 87, "fp16") == "engines/trt-sm87-fp16.vision.plan"


def test_manifest_keeps_engines_and_does_without(manifest: Manifest) -> None:
    assert manifest.engines == {}
    assert "engines" not in json.loads(manifest.to_json())
    written = replace(manifest, engines={NAME: record_of(manifest)})
    assert Manifest.from_json(written.to_json()) == written


def test_bundle_answers_without_its_engines(tiny_v1_bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_v1_bundle, folder)
    (folder / MANIFEST).write_text(replace(manifest, engines={NAME: record_of(manifest)}).to_json())
    assert list(Bundle(folder, verify=True).manifest.engines) == [NAME]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update({"../x.plan": e[NAME]}), "'../x.plan', which lies outside"),
        (lambda e: e.update({"/x.plan": e[NAME]}), "'/x.plan', which lies outside"),
        (lambda e: e[NAME].pop("graph_sha256"), "graph_sha256"),
        (lambda e: e[NAME].update(max_length="512"), "max_length should be int"),
        (lambda e: e.update({NAME: "plan"}), "is damaged"),
    ],
)
def test_damaged_entries(manifest: Manifest, change: Callable[[dict[str, Any]], object], words: str) -> None:
    values = json.loads(replace(manifest, engines={NAME: record_of(manifest)}).to_json())
    change(values["engines"])
    with pytest.raises(runtime.BundleError, match=words):
        Manifest.from_json(json.dumps(values))


@pytest.mark.parametrize("graph", WEIGHTS)
def test_current_engine(manifest: Manifest, graph: str) -> None:
    for plugin in ("1" * 64, None):
        assert why_stale(NAME, record_of(manifest, graph), manifest, plugin, "bundle") is None


def test_vision_plan_has_no_plugin(manifest: Manifest) -> None:
    assert why_stale(NAME, record_of(manifest, VISION_GRAPH), manifest, "2" * 64, "bundle") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graph_sha256": "0"}, "was built from another decoder.onnx than the bundle has now"),
        ({"weights_sha256": "0"}, "was built with other decoder.weights than the bundle has now"),
        (
            {"plugin_sha256": "2" * 64},
            "was built with another plugin (SHA-256 222222222222…, now 111111111111…)",
        ),
        ({"max_length": 9000}, "was built for 9000 tokens, the bundle has 8192"),
        ({"graph": "other.onnx"}, "was built from other.onnx, which the bundle does not have"),
    ],
)
def test_stale_engine_says_how_to_build_it_again(manifest: Manifest, change: dict[str, Any], reason: str) -> None:
    record = replace(record_of(manifest), **change)
    assert why_stale(NAME, record, manifest, "1" * 64, "my bundle") == (
        f"{NAME} {reason}: build it again with: python -m export.engine --bundle 'my bundle' --target trt-rtx --sm 89 "
        f"--max-length {record.max_length} --max-batch 2 --overwrite"
    )


def test_a_new_export_makes_engines_stale(manifest: Manifest) -> None:
    record = record_of(manifest)
    files = {**manifest.files, DECODER_WEIGHTS: replace(manifest.files[DECODER_WEIGHTS], sha256="other")}
    message = why_stale(NAME, record, replace(manifest, files=files), None, "bundle")
    assert message is not None
    assert "other decoder.weights" in message


def test_rebuild_command_leaves_the_gpu_at_hand_to_tensorrt(manifest: Manifest) -> None:
    command = shlex.split(rebuild_command(replace(record_of(manifest), target="trt"), "bundle"))
    assert "--sm" not in command
    assert command[command.index("--target") + 1] == "trt"
