"""The facts of a checkpoint, read from its config.json and checked before any work begins.

Keys are those of the official configuration classes (InternVLChatConfig, InternLM2Config). A value with which the
exported graphs would be wrong is refused by key and value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from export.errors import CheckpointError
from runtime.images.preprocess import MAX_TILES
from runtime.records import read_json as read_json_file

T = TypeVar("T")

_MOST = 1 << 24
"""Of any size. Layers, tiles and pixels of a side have limits of their own, since work and memory grow with them."""


@dataclass(frozen=True)
class ModelConfig:
    """What the graphs and the runtime need to know of a checkpoint; sizes in elements."""

    version: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    image_size: int
    patch_size: int
    vision_hidden_size: int
    pixel_shuffle: int
    template: str
    dynamic_image_size: bool
    use_thumbnail: bool
    min_tiles: int
    max_tiles: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_attention_experts(self) -> bool:
        """Whether wqkv and wo have a visual expert too (version 1.5)."""
        return self.version == "1.5"

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens that one tile becomes."""
        return (self.patches_per_side // self.pixel_shuffle) ** 2


class _Reader:
    """Typed access to a JSON object, with errors that name the key."""

    def __init__(self, file: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.file, self.values, self.prefix = file, values, prefix

    def section(self, key: str) -> _Reader:
        return _Reader(self.file, self.get(key, dict), f"{self.prefix}{key}.")

    def value(self, key: str, default: object = None) -> Any:  # noqa: ANN401 - as the file has it
        """Returns a value; null is the same as none."""
        found = self.values.get(key)
        return default if found is None else found

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.value(key, default)
        if value is None:
            raise CheckpointError(f"{self.file}: key {self.prefix}{key} is missing; it is not of a Mono-InternVL")
        if kind is float and type(value) is int and abs(value) <= _MOST:
            value = float(value)
        if type(value) is not kind:
            got = f"{json.dumps(value):.200}"
            raise CheckpointError(f"{self.file}: {self.prefix}{key} should be {kind.__name__}, got {got}")
        return value

    def positive(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        value = self.get(key, int, default)
        if not 0 < value <= most:
            raise self.unsupported(key, f"a positive number up to {most:,}", value)
        return value

    def require(self, key: str, expected: object, default: object) -> None:
        value = self.value(key, default)
        if value != expected:
            raise self.unsupported(key, json.dumps(expected), value)

    def unsupported(self, key: str, expected: str, value: object) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {self.prefix}{key} = {json.dumps(value):.200} is not supported, expected {expected}"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    values = read_json_file(file, CheckpointError, ": expected a file of a Mono-InternVL checkpoint")
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def read_config(folder: Path) -> ModelConfig:
    """Reads and checks ``config.json``.

    Raises:
        CheckpointError: not a Mono-InternVL, a key missing, or a value that is not supported.
    """
    root = _Reader(folder / "config.json", read_json(folder / "config.json"))
    if root.values.get("model_type") != "internvl_chat" or "llm_config" not in root.values:
        raise CheckpointError(
            f"{root.file}: model_type = {json.dumps(root.values.get('model_type')):.200} is not a Mono-InternVL, "
            'expected "internvl_chat" with an llm_config'
        )
    llm, vision = root.section("llm_config"), root.section("vision_config")
    # A plain InternVL has the same model_type; its language model and vision tower tell it apart.
    llm.require("architectures", ["InternLM2VEForCausalLM"], default=None)
    vision.require("architectures", ["InternVisionPatchModel"], default=None)
    for section, key, value in (
        (llm, "hidden_act", "silu"),
        (llm, "bias", False),
        (llm, "tie_word_embeddings", False),
        (root, "ps_version", "v2"),
        (root, "pad2square", False),
        (root, "use_backbone_lora", 0),
        (root, "use_llm_lora", 0),
        (vision, "num_channels", 3),
    ):
        section.require(key, value, default=value)
    hidden, heads = llm.positive("hidden_size"), llm.positive("num_attention_heads")
    kv_heads = llm.positive("num_key_value_heads", heads)
    if hidden % heads or (hidden // heads) % 2:
        raise llm.unsupported("num_attention_heads", f"a divisor of hidden_size {hidden} with even heads", heads)
    if heads % kv_heads:
        raise llm.unsupported("num_key_value_heads", f"a divisor of num_attention_heads {heads}", kv_heads)
    image_size, patch = vision.positive("image_size"), vision.positive("patch_size")
    forced = root.positive("force_image_size", image_size, most=1 << 14)
    if forced != image_size:
        raise root.unsupported("force_image_size", f"vision_config.image_size {image_size}", forced)
    ratio = root.get("downsample_ratio", float)
    shuffle = round(1 / ratio) if 0 < ratio <= 1 else 0
    if shuffle == 0 or abs(ratio * shuffle - 1) > 1e-6 or image_size % (patch * shuffle):
        raise root.unsupported("downsample_ratio", f"1/k with k·{patch} dividing {image_size}", ratio)
    min_tiles, max_tiles = root.positive("min_dynamic_patch", 1), root.positive("max_dynamic_patch", 12, MAX_TILES)
    if min_tiles > max_tiles:
        raise root.unsupported("min_dynamic_patch", f"at most max_dynamic_patch {max_tiles}", min_tiles)

    return ModelConfig(
        version="1.5" if llm.get("attention_ve", bool, False) else "1.0",
        hidden_size=hidden,
        intermediate_size=llm.positive("intermediate_size"),
        num_hidden_layers=llm.positive("num_hidden_layers", most=1024),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=llm.positive("vocab_size"),
        rms_norm_eps=llm.get("rms_norm_eps", float),
        rope_theta=_rope_theta(llm),
        max_position_embeddings=llm.positive("max_position_embeddings"),
        image_size=image_size,
        patch_size=patch,
        vision_hidden_size=vision.positive("hidden_size"),
        pixel_shuffle=shuffle,
        template=root.get("template", str),
        dynamic_image_size=root.get("dynamic_image_size", bool, False),
        use_thumbnail=root.get("use_thumbnail", bool, False),
        min_tiles=min_tiles,
        max_tiles=max_tiles,
    )


def _rope_theta(llm: _Reader) -> float:
    """Reads the base of the rotary embedding: ``rope_theta``, or that of transformers 5's ``rope_parameters``.

    These, and ``rope_scaling``, may scale the positions. Only dynamic scaling is left alone: it changes nothing up to
    max_position_embeddings, beyond which no bundle goes.
    """
    kinds: dict[str, Any] = {}
    thetas = {llm.prefix + "rope_theta": llm.get("rope_theta", float)} if llm.value("rope_theta") is not None else {}
    supported = dict.fromkeys(("type", "rope_type"), ("dynamic", "default")) | {
        "original_max_position_embeddings": (llm.value("max_position_embeddings"),),
        "partial_rotary_factor": (1.0,),
    }
    for key in ("rope_scaling", "rope_parameters"):
        rope = _Reader(llm.file, llm.get(key, dict, {}), f"{llm.prefix}{key}.")
        given = {name: value for name, value in rope.values.items() if value is not None}
        for name, value in given.items():
            if name == "rope_theta":
                thetas[rope.prefix + name] = rope.get(name, float)
            elif name == "factor" and not {"type", "rope_type"} & set(given):
                raise rope.unsupported(name, "a rope_type beside it", value)
            elif name != "factor" and value not in supported.get(name, ()):
                raise rope.unsupported(name, " or ".join(map(json.dumps, supported.get(name, (None,)))), value)
            elif name in ("type", "rope_type"):
                kinds[rope.prefix + name] = value
    for said in (kinds, thetas):
        for key, value in said.items():
            if value != (first := next(iter(said.values()))):
                raise CheckpointError(
                    f"{llm.file}: {key} = {json.dumps(value)} contradicts {next(iter(said))} = {json.dumps(first)}: "
                    "take out the one that is wrong"
                )
    return next(iter(thetas.values())) if thetas else llm.get("rope_theta", float)
