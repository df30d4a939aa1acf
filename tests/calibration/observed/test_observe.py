"""What is observed, against the same activations in PyTorch; records; runs that go on."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import calibration.observed.observe
from calibration import CalibrationError
from calibration.data import Example, digest, read_examples
from calibration.observed.observe import observe
from calibration.observed.record import Origin, Record, bundle_hash
from calibration.observed.statistics import merged
from calibration.trial.prober import Prober
from export.checkpoint.reader import Checkpoint
from export.model.weights import load_decoder
from export.quantized.quantizable import choose_matrices, find_matrices
from export.quantized.weights import DecoderWeights
from runtime.backends.graph import cache_names
from runtime.bundle.manifest import DECODER_WEIGHTS
from runtime.bundle.reader import Bundle
from runtime.model import load

GOLDEN = Path(__file__).resolve().parents[2] / "data/golden"
TOKENS = 6


def fresh(
    weights: DecoderWeights, examples: Sequence[Example], everything: bool = True, tokens: int = TOKENS
) -> Record:
    matrices = find_matrices(weights.model)
    matrices = choose_matrices(matrices, ("text", "visual"), True, True) if everything else choose_matrices(matrices)
    names = tuple(matrix.name for matrix in matrices)
    hashes = bundle_hash(weights.bundle.manifest), "test", digest(examples)
    origin = Origin(*hashes, len(examples), 0, None, tokens, names)
    return Record.nothing(origin, [matrix.channels for matrix in matrices])


def observed(folder: Path, examples: Sequence[Example], file: Path, everything: bool = True) -> Record:
    weights = DecoderWeights(Bundle(folder))
    record = fresh(weights, examples, everything)
    observe(weights, examples, record, file, lambda count: None)
    return record


class Hooks:
    """The inputs of all matrices of the PyTorch decoder, by phase and matrix; text and visual rows apart."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.phase = "prompt"
        self.pieces: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        for name, module in decoder.named_modules():
            if name.endswith(("qkv", "attention.output", "feed_forward", "lm_head")):
                module.register_forward_pre_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def take(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x, mask = arguments
            if hasattr(module, "weight"):
                self.add(f"{name}.weight", x.reshape(-1, x.shape[-1]))
                return
            for expert, rows in (("text", x[~mask]), ("visual", x[mask])):
                if hasattr(module, f"{expert}_weight"):
                    self.add(f"{name}.{expert}_weight", rows)
                else:
                    self.add(f"{name}.{expert}_gate_up", rows)
                    gate, up = F.linear(rows, getattr(module, f"{expert}_gate_up")).chunk(2, dim=-1)
                    self.add(f"{name}.{expert}_down", F.silu(gate) * up)

        return take

    def add(self, name: str, rows: torch.Tensor) -> None:
        self.pieces[self.phase, name].append(rows.numpy())


@pytest.mark.parametrize("version", ["v1", "v15"])
def test_against_pytorch(version: str, request: pytest.FixtureRequest, pairs: Path, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{version}_bundle")
    examples = [read_examples(pairs)[index] for index in (1, 21)]
    record = observed(folder, examples, tmp_path / "record.npz")

    model = load(folder)
    prober = Prober(model, None, TOKENS)
    decoder = load_decoder(Checkpoint(GOLDEN / f"tiny-{version}/checkpoint"), torch.float32, 512)
    hooks = Hooks(decoder)
    facts = model.bundle.manifest.model
    filled: dict[str, list[np.ndarray]] = defaultdict(list)
    for example in examples:
        prompt = prober.prompt(example)
        ids = [token for token, _ in prober.answer(prompt)]
        embeds = model.embed(prompt.ids)
        if prompt.visual_mask.any():
            embeds[prompt.visual_mask] = prompt.images[0].embeds()
        pieces = [(embeds, prompt.visual_mask)]
        pieces += [(model.embed(np.array([token])), np.zeros(1, np.bool_)) for token in ids[:-1]]
        shape = (1, facts.num_key_value_heads, 512, facts.head_dim)
        caches, start = [torch.zeros(shape) for _ in range(2 * facts.num_hidden_layers)], 0
        for index, (chunk, mask) in enumerate(pieces):
            hooks.phase = "generated" if index else "prompt"
            positions = torch.arange(start, start + len(chunk))[None]
            with torch.no_grad():
                inputs = torch.from_numpy(chunk)[None], torch.from_numpy(mask)[None]
                _, caches = decoder(*inputs, positions, positions[:, 0], caches)
            start += len(chunk)
        for name, cache in zip(cache_names(facts.num_hidden_layers), caches, strict=True):
            filled[name].append(cache[0, :, :start].numpy())

    assert list(record.caches) == list(filled)
    for name, held in filled.items():
        largest = np.abs(np.concatenate(held, axis=1)).max(axis=1)
        np.testing.assert_allclose(record.caches[name], largest, rtol=0, atol=1e-5 * largest.max())
    assert {name for _, name in hooks.pieces} == set(record.observed)
    for name, halves in record.observed.items():
        both = merged(halves)
        for phase in ("prompt", "generated"):
            rows, statistics = np.concatenate(hooks.pieces[phase, name]), getattr(both, phase)
            assert statistics.rows == len(rows), (name, phase)
            if len(rows):
                near = {"rtol": 0, "atol": 1e-5 * np.abs(rows).max(), "err_msg": f"{name} {phase}"}
                np.testing.assert_allclose(statistics.low, rows.min(axis=0), **near)
                np.testing.assert_allclose(statistics.high, rows.max(axis=0), **near)
                root = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=0))
                np.testing.assert_allclose(np.sqrt(statistics.mean_square), root, **near)


def test_answers_that_are_given_are_followed(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    """The tokens of the answer count as generated, without the one that ends it, which is never fed."""
    example = next(item for item in read_examples(pairs) if item.answer)
    model = load(tiny_v1_bundle)
    prober = Prober(model, None, 50)
    prompt, ids = prober.prompt_and_answer(example)
    assert ids is not None
    assert ids[-1] in model.stop_ids
    assert model.tokenizer.decode(ids) == example.answer
    assert prompt.ids.tolist() == model.session(list(example.images), example.prompt, max_new_tokens=1).prompt_ids
    weights = DecoderWeights(Bundle(tiny_v1_bundle))
    record = fresh(weights, [example], everything=False, tokens=50)
    observe(weights, [example], record, tmp_path / "record.npz", lambda count: None)
    assert {merged(halves).generated.rows for halves in record.observed.values()} == {len(ids) - 1}


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_v1_bundle: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [item for item in read_examples(pairs) if item.answer or not item.images][:6]
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    observed(tiny_v1_bundle, examples, whole)

    weights = DecoderWeights(Bundle(tiny_v1_bundle))
    monkeypatch.setattr(calibration.observed.observe, "SAVE_EVERY", 0)
    seen = 0

    def interrupt(count: int) -> None:
        nonlocal seen
        seen += count
        if seen == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(weights, examples, fresh(weights, examples), parts, interrupt)
    record = Record.load(parts)
    assert record.done == 4
    told: list[int] = []
    observe(weights, examples, record, parts, told.append)
    assert told == [4, 1, 1]
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [parts, whole]


def damaged(folder: Path, target: Path, matrix: str, value: float) -> Path:
    """A copy of a bundle with one number of one matrix replaced."""
    shutil.copytree(folder, target)
    graph = DecoderWeights(Bundle(folder)).model
    tensor = next(item for item in graph.graph.initializer if item.name == matrix)
    offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    np.memmap(target / DECODER_WEIGHTS, np.float32, "r+", offset=offset, shape=(1,))[0] = value
    return target


def test_values_that_are_not_finite_name_the_layer(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    bundle = damaged(tiny_v1_bundle, tmp_path / "bundle", "layers.2.attention.output.weight", np.nan)
    with pytest.raises(CalibrationError, match=r"layers\.2\.feed_forward\.text_gate_up is given NaN") as caught:
        observed(bundle, read_examples(pairs)[:2], tmp_path / "record.npz", everything=False)
    assert "pairs.jsonl, line 1" in str(caught.value)
    assert not (tmp_path / "record.npz").exists()


def test_an_expert_that_nothing_reaches(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    """Questions without pictures say nothing of the visual expert; that of the last layer is never computed at all."""
    with pytest.raises(CalibrationError, match="reaches the visual expert of layers"):
        observed(tiny_v1_bundle, read_examples(pairs)[-2:], tmp_path / "record.npz")
    record = observed(tiny_v1_bundle, read_examples(pairs)[1:2], tmp_path / "record.npz")
    last = Bundle(tiny_v1_bundle).manifest.model.num_hidden_layers - 1
    assert merged(record.observed[f"layers.{last}.feed_forward.visual_gate_up"]).rows == 0


def test_a_record_comes_back_as_it_was(tiny_v1_bundle: Path, pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "record.npz"
    record = observed(tiny_v1_bundle, read_examples(pairs)[-2:], file, everything=False)
    loaded = Record.load(file)
    assert loaded.complete
    assert loaded.origin == record.origin
    for name, halves in record.observed.items():
        for half, other in zip(halves, loaded.observed[name], strict=True):
            assert half.rows == other.rows > 0
            for phase in ("prompt", "generated"):
                for kind in ("low", "high", "squares", "sample", "priorities"):
                    before, after = getattr(getattr(half, phase), kind), getattr(getattr(other, phase), kind)
                    np.testing.assert_array_equal(before, after)
    assert list(loaded.caches) == list(record.caches) == cache_names(4)
    for name, largest in record.caches.items():
        np.testing.assert_array_equal(loaded.caches[name], largest)
    again = tmp_path / "again.npz"
    loaded.save(again)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bundle": "x"}, "the record of another bundle"),
        ({"data": "x"}, "other data"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"max_tiles": 2}, "max_tiles None, not 2"),
        ({"matrices": ("a", "b")}, "lacks a and 1 more"),
    ],
)
def test_a_record_of_something_else(change: dict[str, Any], expected: str) -> None:
    origin = Origin("bundle", "name", "data", 3, 0, None, 8, ("m",))
    record = Record.nothing(origin, [4])
    record.require(origin, Path("file"))
    other = Origin(**{**{item: getattr(origin, item) for item in origin.__dataclass_fields__}, **change})
    with pytest.raises(CalibrationError, match=expected) as caught:
        record.require(other, Path("file"))
    assert "--record" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04rubbish", json.dumps({}).encode()])
def test_what_is_no_record(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "record.npz"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"record\.npz is not a record"):
        Record.load(file)
    with pytest.raises(CalibrationError, match="no such record"):
        Record.load(tmp_path / "gone.npz")


def test_a_record_from_before_there_were_caches(tmp_path: Path) -> None:
    file = tmp_path / "record.npz"
    header = json.dumps({"format": "monoedge-observation-1", "origin": {}, "done": 0, "rows": {}})
    np.savez(file, header=np.frombuffer(header.encode(), np.uint8))
    with pytest.raises(CalibrationError, match=r"of another version of monoedge \(monoedge-observation-1.*--record"):
        Record.load(file)


@pytest.mark.parametrize(
    "largest", [np.ones(3, "f"), np.ones((2, 3)), np.full((2, 3), np.nan, "f"), -np.ones((2, 3), "f")]
)
def test_caches_that_are_none(largest: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "record.npz"
    record = Record.nothing(Origin("bundle", "name", "data", 3, 0, None, 8, ("m",)), [4])
    record.caches["0.key"] = largest
    record.save(file)
    with pytest.raises(CalibrationError, match=r"damaged one \(the cache 0\.key has"):
        Record.load(file)


def test_pickled_arrays_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "record.npz"
    np.savez(file, header=np.array([{"a": 1}], object))
    with pytest.raises(CalibrationError, match="is not a record"):
        Record.load(file)
