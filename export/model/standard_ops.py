"""Standard ONNX operators that PyTorch has no single function for.

In eager mode each function computes what the ONNX specification says. While ``torch.onnx.export`` traces, it becomes
exactly one node: TensorRT and ONNX Runtime have fused kernels for these nodes, not for the dozens of small ones into
which the exporter would take them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch.compiler import is_exporting


def node(
    op_type: str, inputs: Sequence[torch.Tensor], attributes: Mapping[str, float | str], like: torch.Tensor, opset: int
) -> torch.Tensor:
    """Returns the output of a new node, of the type and shape of ``like``; ``opset`` is the operator's."""
    return torch.onnx.ops.symbolic(op_type, inputs, dict(attributes), dtype=like.dtype, shape=like.shape, version=opset)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Computes ``RMSNormalization`` over the last axis: in float32, cast to the type of ``x``, then times ``weight``.

    Args:
        x: [..., hidden].
        weight: [hidden].
        eps: added to the mean square.
    """
    if is_exporting():
        return node("RMSNormalization", [x, weight], {"axis": -1, "epsilon": eps}, x, 23)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Computes ``RotaryEmbedding``, the rotate-half form.

    Args:
        x: [batch, heads, sequence, head_dim].
        cos, sin: tables [positions, head_dim / 2], of the type of ``x``.
        position_ids: int64 [batch, sequence].
    """
    if is_exporting():
        return node("RotaryEmbedding", [x, cos, sin, position_ids], {"interleaved": 0}, x, 23)
    c, s = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * c - right * s, right * c + left * s), dim=-1)


def tensor_scatter(cache: torch.Tensor, update: torch.Tensor, write_indices: torch.Tensor) -> torch.Tensor:
    """Writes ``update`` into a cache of fixed capacity: ``TensorScatter`` along the sequence axis.

    Args:
        cache: [batch, heads, capacity, head_dim].
        update: [batch, heads, sequence, head_dim].
        write_indices: int64 [batch], where the first row of each sequence goes.
    """
    if is_exporting():
        return node("TensorScatter", [cache, update, write_indices], {"axis": 2, "mode": "linear"}, cache, 24)
    result = cache.clone()
    for row, start in enumerate(write_indices.tolist()):
        result[row, :, start : start + update.shape[2]] = update[row]
    return result


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Computes ``Attention`` with grouped heads, scale 1/√head_dim and softmax in float32.

    Args:
        query: [batch, heads, sequence, head_dim].
        key, value: [batch, kv_heads, capacity, head_dim].
        mask: bool [batch, 1, sequence, capacity], true where the key is seen.
    """
    if is_exporting():
        # Without softmax_precision, which TensorRT refuses; its attention has a float32 softmax all the same.
        return node("Attention", [query, key, value, mask], {"scale": 1 / math.sqrt(query.shape[-1])}, query, 24)
    if query.dtype == torch.float32:  # then PyTorch's own, which training wants, has a float32 softmax too
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes ``Gemm`` with transB on the rows of ``x``: the weight is read as it lies, [out, in].

    PyTorch's own translation puts a ``Transpose`` of the weight in front of ``MatMul``, which ONNX Runtime folds
    into a second copy of the weight in memory.
    """
    if not is_exporting():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    inputs = [rows, weight] if bias is None else [rows, weight, bias]
    result = node("Gemm", inputs, {"transB": 1}, rows.new_empty(rows.shape[0], weight.shape[0]), 13)
    return result.reshape(*x.shape[:-1], weight.shape[0])
