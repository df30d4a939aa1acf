"""Mono-InternVL in plain PyTorch, as it is traced. Parameter names here are the initializer names in a bundle.

Source: the official modelling code (OpenGVLab/Mono-InternVL), whose results this reproduces. Two differences
of form: routing is an explicit mask for every token, where the official code applies visual experts in the
first pass only; and the rows of wqkv are sorted into query, key and value heads (``export.checkpoint.tensors``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from export.checkpoint.config import ModelConfig
from export.model.fused_moe import expert_linear, fused_moe
from export.model.standard_ops import attention, linear, rms_norm, rotary_embedding, tensor_scatter


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Gives the modules made inside parameters of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class RMSNorm(nn.Module):
    """Norm shared by both experts."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = _empty(size), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] → the same."""
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """One weight for all tokens; takes the mask to be called as ``ExpertLinear`` is."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = _empty(out_features, in_features)

    def forward(self, x: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, in] → [batch, sequence, out]."""
        return linear(x, self.weight)


class ExpertLinear(nn.Module):
    """One weight for text tokens, one for visual tokens."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.text_weight = _empty(out_features, in_features)
        self.visual_weight = _empty(out_features, in_features)

    def forward(self, x: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, in] → [batch, sequence, out]."""
        return expert_linear(x, visual_mask, self.text_weight, self.visual_weight)


class FusedMoE(nn.Module):
    """Gated feed-forward network with a text and a visual expert."""

    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.text_gate_up, self.text_down = _empty(2 * inter, hidden), _empty(hidden, inter)
        self.visual_gate_up, self.visual_down = _empty(2 * inter, hidden), _empty(hidden, inter)

    def forward(self, x: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, hidden] → the same."""
        return fused_moe(x, visual_mask, self.text_gate_up, self.text_down, self.visual_gate_up, self.visual_down)


class RotaryTable(nn.Module):
    """Cosines and sines of every position up to ``max_length``, computed in float32 as the official code does."""

    def __init__(self, config: ModelConfig, max_length: int) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(max_length, dtype=torch.float32), 1.0 / config.rope_theta**exponents)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()))
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()))


@dataclass(frozen=True)
class Chunk:
    """What all layers need to know of the tokens that are computed now: what ``Decoder.forward`` takes, and angles."""

    visual_mask: torch.Tensor
    position_ids: torch.Tensor
    write_indices: torch.Tensor
    rope: RotaryTable


Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [batch, kv_heads, capacity, head_dim]."""


class Attention(nn.Module):
    """Causal attention with grouped heads over a cache of fixed capacity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        make = ExpertLinear if config.has_attention_experts else Linear
        self.qkv = make(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.output = make(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, chunk: Chunk, cache: Cache, last_only: bool) -> tuple[torch.Tensor, Cache]:
        """[batch, sequence, hidden] → the same (one row with ``last_only``), and the caches with this chunk."""
        visual_mask, position_ids, cos, sin = chunk.visual_mask, chunk.position_ids, chunk.rope.cos, chunk.rope.sin
        # Sliced by heads: the exporter turns torch.split into operators on sequences, which TensorRT lacks.
        heads = self.qkv(x, visual_mask).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key = heads[:, : self.heads], heads[:, self.heads : self.heads + self.kv_heads]
        value = heads[:, self.heads + self.kv_heads :]
        key_cache = tensor_scatter(cache[0], rotary_embedding(key, cos, sin, position_ids), chunk.write_indices)
        value_cache = tensor_scatter(cache[1], value, chunk.write_indices)
        if last_only:
            query, position_ids, visual_mask = query[:, :, -1:], position_ids[:, -1:], visual_mask[:, -1:]
        query = rotary_embedding(query, cos, sin, position_ids)
        # Causal, and shut to the part of the cache that is not filled yet.
        seen = torch.arange(key_cache.shape[2]) <= position_ids[:, None, :, None]
        mixed = attention(query, key_cache, value_cache, seen).transpose(1, 2).flatten(2)
        return self.output(mixed, visual_mask), (key_cache, value_cache)


class DecoderLayer(nn.Module):
    """Attention and feed-forward experts, each behind its norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FusedMoE(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor, chunk: Chunk, cache: Cache, last_only: bool) -> tuple[torch.Tensor, Cache]:
        """[batch, sequence, hidden] → the same (one row with ``last_only``), and the caches with this chunk."""
        attended, cache = self.attention(self.attention_norm(x), chunk, cache, last_only)
        visual_mask = chunk.visual_mask
        if last_only:
            x, visual_mask = x[:, -1:], visual_mask[:, -1:]
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x), visual_mask), cache


class Decoder(nn.Module):
    """The language model over embeddings, one graph for prefill, chunked prefill and decode.

    Args:
        config: sizes.
        max_length: positions that the rotary table covers.
        last_only: the last layer and the head work on the last position only, which is all that decoding needs.
    """

    def __init__(self, config: ModelConfig, max_length: int, last_only: bool = True) -> None:
        super().__init__()
        self.rope = RotaryTable(config, max_length)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.last_only = last_only

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        visual_mask: torch.Tensor,
        position_ids: torch.Tensor,
        write_indices: torch.Tensor,
        past_key_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Takes one chunk of tokens through all layers.

        Args:
            inputs_embeds: [batch, sequence, hidden].
            visual_mask: bool [batch, sequence].
            position_ids: int64 [batch, sequence].
            write_indices: int64 [batch], where in the caches this chunk begins.
            past_key_values: key and value of layer 0, of layer 1, …, each [batch, kv_heads, capacity, head_dim].

        Returns:
            logits in float32, [batch, vocab] of the last position ([batch, sequence, vocab] without
            ``last_only``), and the caches in the order in which they came.
        """
        x, present = inputs_embeds, list[torch.Tensor]()
        chunk = Chunk(visual_mask, position_ids, write_indices, self.rope)
        for index, layer in enumerate(self.layers):
            last_only = self.last_only and index == len(self.layers) - 1
            cache = (past_key_values[2 * index], past_key_values[2 * index + 1])
            x, cache = layer(x, chunk, cache, last_only)
            present += cache
        logits = self.lm_head(self.norm(x[:, -1] if self.last_only else x), visual_mask).float()
        return logits, present


class Vision(nn.Module):
    """Tiles of pixels to visual tokens: patch embedding, pixel shuffle and projector; no vision tower."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, wide = config.vision_hidden_size, config.vision_hidden_size * config.pixel_shuffle**2
        self.config = config
        self.patch_embedding = nn.Conv2d(3, channels, config.patch_size, stride=config.patch_size)
        self.position_embedding = _empty(config.patches_per_side**2, channels)
        self.projector_norm = nn.LayerNorm(wide, eps=1e-5)
        self.projector_in = nn.Linear(wide, config.hidden_size)
        self.projector_out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, image_size, image_size] → [tiles, tokens_per_tile, hidden]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position_embedding
        k, side = self.config.pixel_shuffle, self.config.patches_per_side // self.config.pixel_shuffle
        blocks = patches.reshape(-1, side, k, side, k, patches.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        tokens = blocks.reshape(-1, side * side, k * k * patches.shape[-1])
        hidden = F.gelu(linear(self.projector_norm(tokens), self.projector_in.weight, self.projector_in.bias))
        return linear(hidden, self.projector_out.weight, self.projector_out.bias)
