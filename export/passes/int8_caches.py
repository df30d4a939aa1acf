"""Attention over INT8 caches, for ONNX Runtime on a CPU: each channel of each head has one scale.

Keys, turned by their positions, and values are rounded as they are written: to the nearest multiple of the scale, ties
to even, from -128 to 127. Attention sees what they were rounded to, those of its own chunk too, so that it does not
matter how a prompt was cut. Two ways give the same numbers, as far as float32 does:

- ``GroupQueryAttention`` reads INT8 caches as they lie, which makes it fast where memory is what it waits for: for
  single rows. It widens each key and value anew for every row, which makes it slow for many.
- For more than ``FEW`` rows the caches are widened once, and ``GroupQueryAttention`` computes with the floats.

``docs/performance.md`` has the times. Both stand in a function of the model, which ONNX Runtime writes out when it
opens it; the caches are written in place all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from export.errors import QuantizationError
from plugins_trt.function import CPU_DOMAIN
from runtime.bundle.manifest import ModelFacts

DOMAIN, NAME = "monoedge.cpu", "AttentionOverInt8Caches"

FEW = 16
"""Up to that many rows, the caches are read as they lie."""

_BODY = """
<opset_import: ["" : {opset}, "{ours}" : 1], domain: "{domain}">
{name} <scale>
    (rows, past_key, past_value, key_scale, value_scale, last_key, length, cos, sin, few, positions, write_indices)
    => (result, present_key, present_value) {{
  result, present_key, present_value = If (few) <
    then_branch = as_they_lie () => ({results}) {{
      attended, keys, values = {ours}.GroupQueryAttention <
          num_heads = {heads}, kv_num_heads = {kv_heads}, do_rotary = 1, scale: float = @scale,
          kv_cache_bit_width = 8, k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL"
      > (rows, "", "", past_key, past_value, last_key, length, cos, sin, "", "", "", key_scale, value_scale)
    }},
    else_branch = widened () => ({results}) {{
      sizes = Constant <value = int64[3] {{{query_size}, {kv_size}, {kv_size}}}> ()
      plain_query, plain_key, value = Split <axis = 2> (rows, sizes)
      query = {ours}.RotaryEmbedding <num_heads = {heads}> (plain_query, positions, cos, sin)
      key = {ours}.RotaryEmbedding <num_heads = {kv_heads}> (plain_key, positions, cos, sin)
      all = Constant <value = int64[1] {{-1}}> ()
      key_step = Reshape (key_scale, all)
      value_step = Reshape (value_scale, all)
      key_ratio = Div (key, key_step)
      value_ratio = Div (value, value_step)
      key_nearest = Round (key_ratio)
      value_nearest = Round (value_ratio)
      lowest = Constant <value = float {{-128.0}}> ()
      largest = Constant <value = float {{127.0}}> ()
      key_number = Clip (key_nearest, lowest, largest)
      value_number = Clip (value_nearest, lowest, largest)
      key_seen = Mul (key_number, key_step)
      value_seen = Mul (value_number, value_step)
      past_key_number = Cast <to = 1> (past_key)
      past_value_number = Cast <to = 1> (past_value)
      past_key_seen = Mul (past_key_number, key_scale)
      past_value_seen = Mul (past_value_number, value_scale)
      attended, key_unused, value_unused = {ours}.GroupQueryAttention <
          num_heads = {heads}, kv_num_heads = {kv_heads}, scale: float = @scale
      > (query, key_seen, value_seen, past_key_seen, past_value_seen, last_key, length)
      by_head = Constant <value = int64[4] {{0, 0, {kv_heads}, {head_dim}}}> ()
      key_int8 = Cast <to = 3> (key_number)
      value_int8 = Cast <to = 3> (value_number)
      key_by_row = Reshape (key_int8, by_head)
      value_by_row = Reshape (value_int8, by_head)
      new_key = Transpose <perm = [0, 2, 1, 3]> (key_by_row)
      new_value = Transpose <perm = [0, 2, 1, 3]> (value_by_row)
      keys = TensorScatter <axis = 2> (past_key, new_key, write_indices)
      values = TensorScatter <axis = 2> (past_value, new_value, write_indices)
    }}
  >
}}
"""


@dataclass(frozen=True)
class CachePlan:
    """How one layer's keys, as they lie in the cache, and values are stored in INT8, in form ``cpu`` alone.

    Attributes:
        layer: index of the layer.
        key, value: scales, float32 [kv_heads, head_dim], positive: one a channel of a head.
    """

    layer: int
    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]


def check_caches(caches: Sequence[CachePlan], facts: ModelFacts) -> dict[int, CachePlan]:
    """Returns the plans by their layers.

    Raises:
        QuantizationError: they do not fit the model.
    """
    shape, layers = (facts.num_key_value_heads, facts.head_dim), facts.num_hidden_layers
    for plan in caches:
        if plan.layer not in range(layers):
            raise QuantizationError(f"the caches of layer {plan.layer} are planned, of {layers} layers")
        for kind, scale in (("key", plan.key), ("value", plan.value)):
            if scale.shape != shape or not (np.isfinite(scale) & (scale > 0)).all():
                raise QuantizationError(
                    f"layer {plan.layer}: scales of the {kind} cache should be {list(shape)} positive numbers, got "
                    f"{list(scale.shape)} from {scale.min()}"
                )
    by_layer = {plan.layer: plan for plan in caches}
    if len(by_layer) != len(caches):
        raise QuantizationError("the caches of a layer are planned twice")
    return by_layer


def body(facts: ModelFacts, opset: int) -> onnx.FunctionProto:
    """Returns the function for the sizes of a model.

    Inputs are those of ``GroupQueryAttention``, and: ``few``, bool [1], whether the rows are at most ``FEW``;
    ``positions``, int64 [batch, sequence]; ``write_indices``, int64 [batch], the first of them. Scales are
    [1, kv_heads, 1, head_dim].
    """
    heads, kv_heads, head_dim = facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    products = {"query_size": heads * head_dim, "kv_size": kv_heads * head_dim}
    cache = f"int8[batch, {kv_heads}, capacity, {head_dim}]"
    results = f"float[batch, sequence, {heads * head_dim}] attended, {cache} keys, {cache} values"
    fixed = {"domain": DOMAIN, "name": NAME, "ours": CPU_DOMAIN, "opset": opset}
    return onnx.parser.parse_function(_BODY.format(results=results, **fixed, **sizes, **products))


def scale_values(graph: ir.Graph, plan: CachePlan) -> list[ir.Value]:
    """Returns initializers with the scales of keys and of values, added to a graph."""
    values = []
    for kind, scale in (("key", plan.key), ("value", plan.value)):
        tensor = ir.tensor(scale.astype(np.float32)[None, :, None])
        values.append(ir.val(f"layers.{plan.layer}.attention.{kind}_cache_scale", const_value=tensor))
        graph.register_initializer(values[-1])
    return values
