"""The definition of the operators for C++: ``python -m plugins_trt.header`` writes ``plugins_trt/trt/schema.h``.

The file is kept under version control, so that a device builds the plugin without Python. A test compares it with
``plugins_trt.schema``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plugins_trt.schema import DOMAIN, OPERATORS, PLUGIN_OPERATORS, VERSION, Operator, Tensor

HEADER = Path(__file__).parent / "trt/schema.h"

_KINDS = {"T": "Kind::kT", "bool": "Kind::kBool", "int8": "Kind::kInt8", "float32": "Kind::kFloat32"}

_TEXT = """\
// The operators as plugins_trt/schema.py defines them. Written by: python -m plugins_trt.header

#pragma once

#include "operator.h"

namespace monoedge::schema
{{

inline constexpr char kNamespace[]{{"{namespace}"}};
inline constexpr char kVersion[]{{"{version}"}};

enum Dim : std::int32_t {{ {dims}, kDims }};
inline constexpr char const* kDimNames[kDims]{{{dim_names}}};

// Inputs that all operators of a family have, first and in this order.
{families}
inline constexpr Operator kOperators[]{{
{operators}
}};

}} // namespace monoedge::schema
"""

_FAMILY = """
namespace {name}
{{
enum Input : std::int32_t {{ {inputs} }};
}}
"""


def header() -> str:
    """Returns the text of ``schema.h``."""
    tensors = (tensor for operator in PLUGIN_OPERATORS for tensor in (*operator.inputs, *operator.outputs))
    dims = list(dict.fromkeys(dim for tensor in tensors for _, dim in map(_extent, tensor.shape)))
    return _TEXT.format(
        namespace=DOMAIN,
        version=VERSION,
        dims=_constants(dims),
        dim_names=", ".join(f'"{dim}"' for dim in dims),
        families="".join(
            _FAMILY.format(name=operator.name, inputs=_constants(tensor.name for tensor in operator.inputs))
            for operator in OPERATORS
        ),
        operators="\n".join(map(_operator, PLUGIN_OPERATORS)),
    )


def _operator(operator: Operator) -> str:
    if len(operator.outputs) != 1:
        raise ValueError(f"{operator.name} has {len(operator.outputs)} outputs: the plugin is written for one")
    names = [tensor.name for tensor in operator.inputs]
    inputs = ",\n            ".join(_tensor(tensor, names) for tensor in operator.inputs)
    output = _tensor(operator.outputs[0], names)
    return f'    {{"{operator.name}", Family::k{operator.family}, {output},\n        {len(names)}, {{{inputs}}}}},'


def _tensor(tensor: Tensor, inputs: list[str]) -> str:
    extents = ", ".join(f"{{{factor}, {_constants([dim])}}}" for factor, dim in map(_extent, tensor.shape))
    scales = "".join(
        f", {inputs.index(name) if name in inputs else 'kNone'}"
        for name in (f"{tensor.name}_scale", f"{tensor.name}_input_scale")
        if tensor.type == "int8"
    )
    return f'{{"{tensor.name}", {_KINDS[tensor.type]}, {len(tensor.shape)}, {{{extents}}}{scales}}}'


def _extent(text: str) -> tuple[int, str]:
    """``2*inter`` → (2, ``inter``)."""
    factor, _, dim = text.rpartition("*")
    return int(factor or 1), dim


def _constants(names: Iterable[str]) -> str:
    """``text_gate_up``, ``in`` → ``kTextGateUp, kIn``."""
    return ", ".join("k" + "".join(part.capitalize() for part in name.split("_")) for name in names)


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
