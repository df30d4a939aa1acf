"""Checkpoints that cannot be exported are refused in one line that names the cause, before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint.config import read_config
from export.checkpoint.reader import Checkpoint, locate
from export.checkpoint.tensors import all_sources, decoder_parameters, vision_parameters
from runtime.errors import MonoedgeError

GOLDEN = Path(__file__).resolve().parents[2] / "data/golden"
FEED_FORWARD = "language_model.model.layers.1.feed_forward.w1.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "tiny-v15/checkpoint", folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets dotted keys of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for name in path:
            section = section[name]
        section.pop(last, None)
        if value is not None:
            section[last] = value
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, count: int = 3) -> list[Path]:
    """The same checkpoint in several files with an index, as the released ones are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files, weight_map = [], {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
        files.append(folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(MonoedgeError) as caught:
        Checkpoint(locate(str(folder)))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_map_covers_the_official_tensors_exactly() -> None:
    for version in ("tiny-v1", "tiny-v15"):
        official = {name: tuple(shape) for name, shape in json.loads((GOLDEN / version / "tensors.json").read_text())}
        config = read_config(GOLDEN / version / "checkpoint")
        assert {source.name: source.shape for source in all_sources(config)} == official


@pytest.mark.parametrize("version", ["tiny-v1", "tiny-v15"])
def test_parameters_are_the_tensors_rearranged(version: str) -> None:
    """Every parameter against its definition on whole tensors."""
    checkpoint = Checkpoint(GOLDEN / version / "checkpoint")
    config, tensors = checkpoint.config, load_file(GOLDEN / version / "checkpoint/model.safetensors")
    groups = config.num_attention_heads // config.num_key_value_heads
    for parameter in vision_parameters(config) + decoder_parameters(config):
        got = torch.cat([block.flatten() for block in checkpoint.blocks(parameter, torch.float32)])
        sources = [tensors[source.name] for source in parameter.sources]
        if parameter.layout == "qkv":
            heads = sources[0].view(config.num_key_value_heads, groups + 2, config.head_dim, config.hidden_size)
            expected = torch.cat(
                [heads[:, :groups].flatten(), heads[:, groups].flatten(), heads[:, groups + 1].flatten()]
            )
        elif parameter.layout == "without_class_row":
            expected = sources[0][0, 1:]
        else:
            expected = torch.cat(sources)
        assert torch.equal(got, expected.flatten()), parameter.name


def test_shards_are_read_as_one_file(checkpoint: Path) -> None:
    whole = Checkpoint(checkpoint)
    parameters = decoder_parameters(whole.config)
    expected = [torch.cat([block.flatten() for block in whole.blocks(item, torch.float32)]) for item in parameters]
    shard(checkpoint)
    parts = Checkpoint(checkpoint)
    for item, values in zip(parameters, expected, strict=True):
        assert torch.equal(torch.cat([block.flatten() for block in parts.blocks(item, torch.float32)]), values)


def test_no_such_folder() -> None:
    with pytest.raises(MonoedgeError, match=r"no such folder, and not a hub id like"):
        locate("/nowhere/at all")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MonoedgeError, match="could not be downloaded") as caught:
        locate("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_file_instead_of_folder(checkpoint: Path) -> None:
    refused(checkpoint / "config.json", "is a file", "folder")


def test_bundle_instead_of_a_checkpoint(tiny_v1_bundle: Path) -> None:
    refused(tiny_v1_bundle, f"{tiny_v1_bundle} is a bundle already: name the checkpoint that it was made from")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "config.json is missing")


@pytest.mark.parametrize("text", ["{", "[]", "\ufffe"])
def test_config_that_is_no_json_object(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="utf-16")
    refused(checkpoint, "config.json")


def test_config_with_a_byte_order_mark(checkpoint: Path) -> None:
    expected = read_config(checkpoint)
    for file in checkpoint.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Checkpoint(checkpoint).config == expected


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "llama", ['model_type = "llama"', "is not a Mono-InternVL"]),
        ("llm_config__architectures", ["InternLM2ForCausalLM"], ["llm_config.architectures", "InternLM2VEForCausalLM"]),
        (
            "vision_config__architectures",
            ["InternVisionModel"],
            ["vision_config.architectures", "InternVisionPatchModel"],
        ),
        ("llm_config__hidden_act", "gelu", ['llm_config.hidden_act = "gelu"', "silu"]),
        ("llm_config__bias", True, ["llm_config.bias = true"]),
        ("llm_config__tie_word_embeddings", True, ["llm_config.tie_word_embeddings"]),
        ("llm_config__rope_scaling", {"type": "linear", "factor": 2.0}, ["llm_config.rope_scaling", "linear"]),
        *(
            (f"llm_config__{key}", value, words)
            for key in ("rope_scaling", "rope_parameters")
            for value, words in (
                ({"type": "linear", "factor": 2.0}, [f'{key}.type = "linear" is not supported, expected "dynamic" or']),
                ({"rope_type": "linear", "factor": 2.0}, [f'{key}.rope_type = "linear"']),
                ({"rope_type": "yarn"}, [f'{key}.rope_type = "yarn"']),
                ({"rope_type": 2}, [f"{key}.rope_type = 2"]),
                ({"factor": 2.0}, [f"{key}.factor = 2.0", "a rope_type beside it"]),
                ({"type": "dynamic", "rope_type": "default"}, [f'{key}.rope_type = "default" contradicts', ".type"]),
                ({"rope_type": "dynamic", "rope_theta": 5}, [f"{key}.rope_theta = 5.0 contradicts", "= 1000000.0"]),
                ({"rope_type": "dynamic", "rope_theta": "5"}, [f"{key}.rope_theta should be float"]),
                ({"rope_type": "dynamic", "partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
                ({"rope_type": "dynamic", "original_max_position_embeddings": 2048}, ["= 2048", "expected 32768"]),
                ({"full_attention": {"rope_type": "default"}}, [f"{key}.full_attention = "]),
                ("linear", [f"{key} should be dict"]),
            )
        ),
        ("llm_config__rope_parameters", {"rope_type": "default"}, ["contradicts", 'rope_scaling.type = "dynamic"']),
        ("llm_config__rope_theta", None, ["llm_config.rope_theta is missing"]),
        ("llm_config__num_attention_heads", 3, ["llm_config.num_attention_heads = 3", "128"]),
        ("llm_config__num_key_value_heads", 3, ["llm_config.num_key_value_heads = 3", "4"]),
        ("llm_config__hidden_size", "128", ['llm_config.hidden_size should be int, got "128"']),
        ("llm_config__hidden_size", -1, ["llm_config.hidden_size = -1", "positive"]),
        ("llm_config__rms_norm_eps", None, ["llm_config.rms_norm_eps is missing"]),
        ("ps_version", "v1", ['ps_version = "v1"', "v2"]),
        ("pad2square", True, ["pad2square = true"]),
        ("downsample_ratio", 0.3, ["downsample_ratio = 0.3"]),
        ("force_image_size", 224, ["force_image_size = 224", "448"]),
        ("min_dynamic_patch", 13, ["min_dynamic_patch = 13", "12"]),
        ("template", "vicuna", ["vicuna", "internlm2-chat"]),
        ("llm_config__vocab_size", 778, ["778", "777"]),
        ("llm_config__intermediate_size", 512, ["feed_forward", "(256, 128)", "(512, 128)"]),
        ("llm_config__num_hidden_layers", 5, ["layers.4", "is missing"]),
        ("llm_config__num_hidden_layers", 3, ["layers.3", "unexpected"]),
        ("llm_config__num_hidden_layers", 1 << 31, ["num_hidden_layers = 2147483648", "a positive number up to 1,024"]),
        ("llm_config__max_position_embeddings", 1 << 40, ["max_position_embeddings = ", "a positive number up to"]),
        ("llm_config__rope_theta", 10**400, ["rope_theta should be float"]),
        ("max_dynamic_patch", 1 << 30, ["max_dynamic_patch = ", "up to 1,000"]),
        ("template", "x" * 1_000_000, ["template must be one of"]),
        ("llm_config__attention_ve", False, ["wo_ve", "unexpected", "1.0"]),
    ],
)
def test_config_values(checkpoint: Path, key: str, value: object, words: list[str]) -> None:
    edit_config(checkpoint, **{key: value})
    refused(checkpoint, *words)


@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 2.0}, None])
def test_config_as_transformers_5_writes_it(
    checkpoint: Path, scaling: dict[str, object] | None, tmp_path: Path
) -> None:
    """Its own configuration class moves the values to their new keys; what is read stays what was read."""
    transformers = pytest.importorskip("transformers", "5.0")
    expected = read_config(checkpoint)
    theirs = transformers.LlamaConfig(
        rope_theta=1000000.0, max_position_embeddings=32768, **({"rope_scaling": scaling} if scaling else {})
    ).to_dict()
    assert "rope_scaling" not in theirs
    rope = {"rope_parameters": theirs["rope_parameters"], "rope_theta": theirs.get("rope_theta")}
    edit_config(checkpoint, llm_config__rope_scaling=None, **{f"llm_config__{key}": rope[key] for key in rope})
    assert "rope_theta" not in json.loads((checkpoint / "config.json").read_text())["llm_config"]
    assert read_config(checkpoint) == expected


def test_null_is_none(checkpoint: Path) -> None:
    """Where a key may be missing, null is the same; official configs have it for keys without a value."""
    optional = ("bias", "hidden_act", "rope_scaling", "rope_parameters", "tie_word_embeddings", "num_key_value_heads")
    root = ("pad2square", "force_image_size", "use_backbone_lora", "use_llm_lora", "min_dynamic_patch")
    edit_config(checkpoint, llm_config__num_key_value_heads=4, min_dynamic_patch=1)
    expected = read_config(checkpoint)
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["llm_config"] |= dict.fromkeys(optional)
    file.write_text(json.dumps(config | dict.fromkeys(root)))
    assert read_config(checkpoint) == expected


def test_missing_tensor(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(FEED_FORWARD))
    refused(checkpoint, FEED_FORWARD, "is missing")


def test_unexpected_tensor(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update(surprise=torch.zeros(3)))
    refused(checkpoint, "surprise", "unexpected")


def test_wrong_shape(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({FEED_FORWARD: torch.zeros(256, 64)}))
    refused(checkpoint, FEED_FORWARD, "(256, 64)", "(256, 128)")


def test_wrong_number_format(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({FEED_FORWARD: torch.zeros(256, 128, dtype=torch.int8)}))
    refused(checkpoint, FEED_FORWARD, "I8", "BF16")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_file(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(checkpoint, "model.safetensors", "truncated or damaged")


def test_truncated_shard(checkpoint: Path) -> None:
    last = shard(checkpoint)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    refused(checkpoint, last.name, "truncated or damaged")


def test_missing_shard(checkpoint: Path) -> None:
    last = shard(checkpoint)[-1]
    last.unlink()
    refused(checkpoint, last.name, "is missing")


def test_a_checkpoint_in_the_cache_of_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    """There every file is a link into ``blobs/``."""
    shard(checkpoint)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(file, tmp_path / f"blobs/{number:x}")
        file.symlink_to(f"../blobs/{number:x}")
    opened, expected = Checkpoint(locate(str(checkpoint))), Checkpoint(GOLDEN / "tiny-v15/checkpoint")
    assert opened.tokenizer_json == expected.tokenizer_json
    for parameter in vision_parameters(expected.config):
        blocks = (list(item.blocks(parameter, torch.float32)) for item in (opened, expected))
        assert all(torch.equal(*pair) for pair in zip(*blocks, strict=True))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, name, "is not a file")


@pytest.mark.parametrize("name", ["..", ".", "", "a\0b", "x" * 5000])
def test_index_with_names_that_are_none(checkpoint: Path, name: str) -> None:
    shard(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003-of-00003.safetensors", json.dumps(name)[1:-1]))
    refused(checkpoint, "checkpoint")


def test_a_place_of_a_user_who_is_not_there() -> None:
    refused(Path("~no-such-user/checkpoint"), "no such folder")


def test_index_that_leads_outside(checkpoint: Path) -> None:
    shard(checkpoint)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003", "../model-00003"))
    refused(checkpoint, "../model-00003", "same folder")


def test_only_pickled_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, "model.safetensors", "other formats are not read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_values_are_found_while_reading(checkpoint: Path, value: float) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[FEED_FORWARD][3].fill_(value))
    opened = Checkpoint(checkpoint)
    (parameter,) = [item for item in decoder_parameters(opened.config) if item.sources[0].name == FEED_FORWARD]
    with pytest.raises(MonoedgeError, match=r"layers\.1\.feed_forward\.text_gate_up holds NaN or infinite"):
        list(opened.blocks(parameter, torch.float32))


def test_float16_range_is_checked(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[FEED_FORWARD][3].fill_(1e5))
    opened = Checkpoint(checkpoint)
    (parameter,) = [item for item in decoder_parameters(opened.config) if item.sources[0].name == FEED_FORWARD]
    with pytest.raises(MonoedgeError, match=r"layers\.1\.feed_forward\.text_gate_up holds 100000, .*bf16"):
        list(opened.blocks(parameter, torch.float16))
