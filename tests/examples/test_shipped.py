"""The two checkpoints that come with the project: students of two tasks, with one language part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import student
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from safetensors.torch import load_file

import runtime
from export.onnx import main as export
from runtime.bundle.manifest import DECODER_GRAPH, EMBEDDINGS

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES, DIGITS = (EXAMPLES / task / "checkpoint" for task in ("shapes", "digits"))
MOST_BYTES = 5_000_000


@pytest.mark.parametrize("folder", [SHAPES, DIGITS], ids=["shapes", "digits"])
def test_a_checkpoint_is_small(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES


def test_the_variants_differ_in_visual_tensors_alone() -> None:
    ours, theirs = (dict(student.load(folder, 512).named_parameters()) for folder in (SHAPES, DIGITS))
    differ = {name for name, parameter in ours.items() if not torch.equal(parameter, theirs[name])}
    assert differ
    assert all(map(student.is_visual, differ)), differ
    for name in ("tokenizer.model", "config.json"):
        assert (SHAPES / name).read_bytes() == (DIGITS / name).read_bytes()


def test_their_bundles_share_every_language_tensor(tmp_path: Path) -> None:
    bundles = [tmp_path / "shapes", tmp_path / "digits"]
    for checkpoint, bundle in zip((SHAPES, DIGITS), bundles, strict=True):
        export(["--ckpt", str(checkpoint), "-o", str(bundle)])
    ours, theirs = map(initializers, bundles)
    assert ours.keys() == theirs.keys()
    differ = {name for name, value in ours.items() if not np.array_equal(value, theirs[name])}
    assert differ
    assert all("visual_" in name for name in differ), differ
    ours_embedded, theirs_embedded = ((bundle / EMBEDDINGS).read_bytes() for bundle in bundles)
    assert ours_embedded == theirs_embedded


def test_digits_are_read_as_pytorch_reads_them(tmp_path: Path) -> None:
    export(["--ckpt", str(DIGITS), "-o", str(tmp_path / "bundle")])
    model = runtime.load(tmp_path / "bundle")
    lines = (DIGITS.parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for record in map(json.loads, lines):
        assert model.session(DIGITS.parent / record["image"], record["prompt"]).text == record["pytorch"]


def initializers(bundle: Path) -> dict[str, np.ndarray]:
    """The weights of a bundle's decoder."""
    tensors = onnx.load(bundle / DECODER_GRAPH, load_external_data=False).graph.initializer
    for tensor in tensors:
        if tensor.external_data:
            load_external_data_for_tensor(tensor, str(bundle))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
