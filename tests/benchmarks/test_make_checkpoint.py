"""Checkpoints of random weights: opened by the exporter, repeatable, and never left half-written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors import safe_open

import runtime
from export.bundle import export_bundle
from export.checkpoint.reader import INDEX_FILE, Checkpoint
from export.checkpoint.tokenizer import convert
from export.options import ExportOptions
from runtime.console.console import SILENT, Advance, Console
from runtime.errors import MonoedgeError
from runtime.text.tokenizer import CHAT_TOKENS, IMAGE_TOKENS, Tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "tests" / "data" / "golden" / "tiny-v15" / "checkpoint"
TEXT = "Describe the image: 三 red squares, a café & 5 shapes! 🙂"


class Failing(Console):
    """A console whose progress bar raises an error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(shows=False)
        self.error = error

    @contextmanager
    def bar(self, name: str, total: int, unit: str = "it") -> Iterator[Advance]:
        def advance(count: int) -> None:
            raise self.error

        yield advance


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("make_checkpoint")


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """A small checkpoint of each version."""
    folder = tmp_path_factory.mktemp("made")
    for version in ("1.0", "1.5"):
        script.make_checkpoint(folder / version, SILENT, version, "tiny")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return tensors


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# ---- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_the_exporter_opens_it(made, version):
    checkpoint = Checkpoint(made / version)
    assert checkpoint.config.version == version
    assert checkpoint.config.vocab_size == 1009
    assert checkpoint.config.num_hidden_layers == 2


def test_versions_differ_in_the_attention_experts_alone(made):
    old, new = tensors_of(made / "1.0"), tensors_of(made / "1.5")
    more = {name for name in new if "wqkv_ve" in name or "wo_ve" in name}
    assert len(more) == 4
    assert_equal(old, {name: tensor for name, tensor in new.items() if name not in more})
    configs = [json.loads((made / version / "config.json").read_text()) for version in ("1.0", "1.5")]
    assert configs[1]["llm_config"].pop("attention_ve") is True
    assert configs[0] == configs[1]


def test_the_full_size_is_that_of_the_released_model(script, tmp_path):
    from export.checkpoint.config import read_config
    from export.checkpoint.tensors import all_sources

    (tmp_path / "config.json").write_text(json.dumps(script._config("1.0", "2b")))
    sources = all_sources(read_config(tmp_path))
    assert len(sources) == 253
    assert sum(np.prod(source.shape) for source in sources) == pytest.approx(3.11e9, rel=2e-3)


def test_values_are_random_bf16_of_the_intended_size(made):
    tensors = tensors_of(made / "1.5")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    wide = tensors["language_model.model.layers.1.feed_forward_ve.w2.weight"].float()
    assert wide.mean().item() == pytest.approx(0, abs=1e-3)
    assert wide.std().item() == pytest.approx(wide.shape[1] ** -0.5, rel=0.02)
    assert tensors["language_model.model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.02)
    assert tensors["mlp1.0.bias"].float().mean().item() == pytest.approx(0, abs=0.02)


def test_rounding_is_that_of_torch(script):
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3FFFFFFF, 0, 0x80000000], np.uint32).view(np.float32)
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16)
    assert script._bfloat16(values).tolist() == expected.tolist()


# ---- the same bytes --------------------------------------------------------------------------------------


def test_a_seed_repeats_every_byte(script, made, tmp_path):
    script.make_checkpoint(tmp_path / "again", SILENT, "1.5", "tiny")
    files = sorted(file.name for file in (made / "1.5").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in files:
        assert (made / "1.5" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_another_seed_changes_every_tensor(script, made, tmp_path):
    script.make_checkpoint(tmp_path / "other", SILENT, "1.5", "tiny", seed=1)
    other = tensors_of(tmp_path / "other")
    assert [name for name, tensor in tensors_of(made / "1.5").items() if torch.equal(tensor, other[name])] == []


def test_shards_and_blocks_change_no_value(script, made, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_VALUES", 1000)
    script.make_checkpoint(tmp_path / "shards", SILENT, "1.5", "tiny", shard_bytes=600_000)
    Checkpoint(tmp_path / "shards")
    assert_equal(tensors_of(made / "1.5"), tensors_of(tmp_path / "shards"))
    index = json.loads((tmp_path / "shards" / INDEX_FILE).read_text())
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert files[1].name == f"model-00002-of-{len(files):05}.safetensors"
    # A tensor that is larger by itself has a shard of its own.
    assert [file.stat().st_size > 610_000 for file in files].count(True) <= 1


# ---- the tokenizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1009, pytest.param(92553, marks=pytest.mark.slow)])
def test_the_grown_tokenizer_is_a_tokenizer(script, tmp_path, vocab_size):
    importlib.import_module("grown_tokenizer").write_tokenizer(TEMPLATE, tmp_path, vocab_size)
    grown = Tokenizer(tokenizers.Tokenizer.from_str(convert(tmp_path, vocab_size)))
    last = [grown.id_of(token) for token in CHAT_TOKENS + IMAGE_TOKENS]
    assert last == list(range(vocab_size - 15, vocab_size))
    official = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert official.vocab_size() == vocab_size - len(IMAGE_TOKENS)
    ids = grown.encode(TEXT, add_bos=False)
    assert ids == official.encode(TEXT)
    assert grown.decode(ids) == TEXT.replace(" !", "!")
    before = Tokenizer(tokenizers.Tokenizer.from_str(convert(TEMPLATE)))
    assert len(ids) < len(before.encode(TEXT, add_bos=False))


# ---- nothing half-written --------------------------------------------------------------------------------


def test_a_folder_that_exists_is_left_alone(script, tmp_path):
    with pytest.raises(MonoedgeError, match="exists already"):
        script.make_checkpoint(tmp_path, SILENT, "1.5", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(script, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        script.make_checkpoint(tmp_path / "out", Failing(KeyboardInterrupt()), "1.5", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_told_with_both_numbers(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: _Usage(1_500_000_000))
    with pytest.raises(MonoedgeError, match=r"needs 6\.84 GB, .* has 1\.50 GB free"):
        script.make_checkpoint(tmp_path / "out", SILENT)
    assert list(tmp_path.iterdir()) == []


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_full_disk_is_told_and_leaves_nothing(script, tmp_path):
    full = Failing(OSError(28, "No space left on device"))
    with pytest.raises(MonoedgeError, match="No space left on device; nothing was kept"):
        script.make_checkpoint(tmp_path / "out", full, "1.5", "tiny")
    assert list(tmp_path.iterdir()) == []


# ---- used ------------------------------------------------------------------------------------------------


def test_the_command_line_explains_itself_without_torch(tmp_path):
    # A torch that cannot be imported, found before the real one.
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, str(ROOT / "benchmarks" / "make_checkpoint.py")]
    environment = {**os.environ, "PYTHONPATH": paths}
    told = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, check=True)
    assert "examples:" in told.stdout
    refused = subprocess.run([*command, "x", "--seed", "-1"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "expected 0 or more, got -1" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_it_exports_and_answers(made, tmp_path, version):
    checkpoint = Checkpoint(made / version)
    export_bundle(checkpoint, "made", tmp_path / "bundle", ExportOptions(max_length=512), SILENT)
    model = runtime.load(tmp_path / "bundle")
    model.stop_ids = frozenset()
    picture = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    session = model.session(picture, "What is in the picture?", max_new_tokens=4, return_logits=True)
    list(session)
    assert session.stats.visual_tokens == 256
    assert session.logits.shape == (4, 1009)
    # Neither dead nor exploded: the logits of a random model have a standard deviation of about 1.
    assert 0.5 < session.logits.std() < 2
