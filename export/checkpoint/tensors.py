"""The one map between the tensors of a checkpoint and the parameters of ``export.model.modeling``.

Versions 1.0 and 1.5 differ only in the attention experts. No checkpoint of 1.5 has been released; its two names
(``wqkv_ve``, ``wo_ve``) are ours, and this file is the only place to change when official ones appear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from export.checkpoint.config import ModelConfig
from export.external_data import BLOCK_BYTES

RowReader = Callable[[str, int, int], torch.Tensor]
"""Reads rows [start, stop) of a tensor of the checkpoint by name, in the number format that the file has."""


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: its name and shape in the official layout."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model and the checkpoint tensors that it is made of.

    ``layout`` says how: ``stacked``, the sources one below the other (a single one as it is); ``without_class_row``,
    the first row of a [1, 1 + patches, channels] position embedding left out; ``qkv``, the rows of the interleaved
    wqkv sorted into all query heads, all key heads, all value heads.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    layout: Literal["stacked", "without_class_row", "qkv"] = "stacked"


def embedding_parameter(config: ModelConfig) -> Parameter:
    """Returns the token embeddings, which stand beside the graphs: [vocab, hidden]."""
    return _plain("embedding", "language_model.model.tok_embeddings.weight", config.vocab_size, config.hidden_size)


def unused_sources(config: ModelConfig) -> tuple[Source, ...]:
    """Returns the tensors that official checkpoints hold and the official forward pass never reads."""
    return (Source("vision_model.embeddings.class_embedding", (1, 1, config.vision_hidden_size)),)


def vision_parameters(config: ModelConfig) -> list[Parameter]:
    """Returns the parameters of ``modeling.Vision``."""
    channels, hidden, patch = config.vision_hidden_size, config.hidden_size, config.patch_size
    wide, patches = channels * config.pixel_shuffle**2, config.patches_per_side**2
    embeddings = "vision_model.embeddings."
    positions = Source(embeddings + "position_embedding", (1, 1 + patches, channels))
    return [
        _plain("patch_embedding.weight", embeddings + "patch_embedding.weight", channels, 3, patch, patch),
        _plain("patch_embedding.bias", embeddings + "patch_embedding.bias", channels),
        Parameter("position_embedding", (patches, channels), (positions,), "without_class_row"),
        _plain("projector_norm.weight", "mlp1.0.weight", wide),
        _plain("projector_norm.bias", "mlp1.0.bias", wide),
        _plain("projector_in.weight", "mlp1.1.weight", hidden, wide),
        _plain("projector_in.bias", "mlp1.1.bias", hidden),
        _plain("projector_out.weight", "mlp1.3.weight", hidden, hidden),
        _plain("projector_out.bias", "mlp1.3.bias", hidden),
    ]


def decoder_parameters(config: ModelConfig) -> list[Parameter]:
    """Returns the parameters of ``modeling.Decoder``, in the order in which a forward pass reads them."""
    hidden, inter = config.hidden_size, config.intermediate_size
    qkv_rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    experts = {"text_": "", "visual_": "_ve"}
    attention_experts = experts if config.has_attention_experts else {"": ""}
    parameters: list[Parameter] = []
    for index in range(config.num_hidden_layers):
        ours, theirs = f"layers.{index}.", f"language_model.model.layers.{index}."
        parameters.append(_plain(ours + "attention_norm.weight", theirs + "attention_norm.weight", hidden))
        for expert, suffix in attention_experts.items():
            source = Source(f"{theirs}attention.wqkv{suffix}.weight", (qkv_rows, hidden))
            parameters.append(Parameter(f"{ours}attention.qkv.{expert}weight", source.shape, (source,), "qkv"))
        for expert, suffix in attention_experts.items():
            name = f"{ours}attention.output.{expert}weight"
            parameters.append(_plain(name, f"{theirs}attention.wo{suffix}.weight", hidden, hidden))
        parameters.append(_plain(ours + "ffn_norm.weight", theirs + "ffn_norm.weight", hidden))
        for expert, suffix in experts.items():
            w1, w3, w2 = (f"{theirs}feed_forward{suffix}.{w}.weight" for w in ("w1", "w3", "w2"))
            halves = (Source(w1, (inter, hidden)), Source(w3, (inter, hidden)))
            parameters.append(Parameter(f"{ours}feed_forward.{expert}gate_up", (2 * inter, hidden), halves))
            parameters.append(_plain(f"{ours}feed_forward.{expert}down", w2, hidden, inter))
    parameters.append(_plain("norm.weight", "language_model.model.norm.weight", hidden))
    parameters.append(_plain("lm_head.weight", "language_model.output.weight", config.vocab_size, hidden))
    return parameters


def all_sources(config: ModelConfig) -> list[Source]:
    """Returns every tensor that a checkpoint of this config should hold."""
    parameters = [embedding_parameter(config), *vision_parameters(config), *decoder_parameters(config)]
    return [*(source for parameter in parameters for source in parameter.sources), *unused_sources(config)]


def stream(parameter: Parameter, config: ModelConfig, read: RowReader) -> Iterator[torch.Tensor]:
    """Yields the values of a parameter in consecutive blocks of at most about ``BLOCK_BYTES``.

    Joined, the blocks are the parameter in row-major order; their own shapes do not matter.
    """
    if parameter.layout == "without_class_row":
        (source,) = parameter.sources
        yield read(source.name, 0, 1)[0, 1:]
    elif parameter.layout == "qkv":
        yield from _sorted_qkv(parameter, config, read)
    else:
        for source in parameter.sources:
            step = max(1, BLOCK_BYTES // (4 * torch.Size(source.shape[1:]).numel()))
            for start in range(0, source.shape[0], step):
                yield read(source.name, start, min(start + step, source.shape[0]))


def _sorted_qkv(parameter: Parameter, config: ModelConfig, read: RowReader) -> Iterator[torch.Tensor]:
    """wqkv lies as (kv_head, [q_0 … q_(g-1), k, v], head_dim): yields all queries, then all keys, then all values."""
    (source,) = parameter.sources
    groups, head_dim = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    for first, heads in ((0, groups), (groups, 1), (groups + 1, 1)):
        for kv_head in range(config.num_key_value_heads):
            start = (kv_head * (groups + 2) + first) * head_dim
            yield read(source.name, start, start + heads * head_dim)


def _plain(name: str, source: str, *shape: int) -> Parameter:
    return Parameter(name, shape, (Source(source, shape),))
