"""The definition of the operators for C++: ``python -m plugins_trt.header`` writes ``plugins_trt/trt/schema.h``.

The file is kept under version control, so that a device builds the plugin without Python; a test holds that it says
what ``plugins_trt.schema`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
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

enum Dim : std::int32_t
{{
{dims}
    kDims,
}};

inline constexpr char const* kDimNames[kDims]{{{dim_names}}};
{families}{inputs}
inline constexpr Operator kOperators[]{{
{operators}
}};

}} // namespace monoedge::schema
"""

_FAMILY = """
/// Inputs that all operators of the family have, first and in this order.
namespace {name}
{{

enum Input : std::int32_t
{{
{inputs}
}};

}} // namespace {name}
"""

_INPUTS = """
inline constexpr Tensor k{name}Inputs[]{{
{tensors}
}};
"""


def header() -> str:
    """The text of ``schema.h``."""
    dims = list(dict.fromkeys(dim for operator in PLUGIN_OPERATORS for _, dim in _extents(operator)))
    return _TEXT.format(
        namespace=DOMAIN,
        version=VERSION,
        dims="\n".join(f"    {_constant(dim)}," for dim in dims),
        dim_names=", ".join(f'"{dim}"' for dim in dims),
        families="".join(_family(operator) for operator in OPERATORS),
        inputs="".join(_inputs(operator) for operator in PLUGIN_OPERATORS),
        operators="\n".join(_operator(operator) for operator in PLUGIN_OPERATORS),
    )


def _family(operator: Operator) -> str:
    return _FAMILY.format(
        name=operator.name, inputs="\n".join(f"    {_constant(tensor.name)}," for tensor in operator.inputs)
    )


def _inputs(operator: Operator) -> str:
    tensors = "\n".join(f"    {_tensor(tensor, operator)}," for tensor in operator.inputs)
    return _INPUTS.format(name=operator.name, tensors=tensors)


def _operator(operator: Operator) -> str:
    if len(operator.outputs) != 1:
        raise ValueError(f"{operator.name} has {len(operator.outputs)} outputs: the plugin is written for one")
    return (
        f'    {{"{operator.name}", Family::k{operator.family}, {len(operator.inputs)}, k{operator.name}Inputs,\n'
        f"        {_tensor(operator.outputs[0], operator)}}},"
    )


def _tensor(tensor: Tensor, operator: Operator) -> str:
    extents = ", ".join(f"{{{factor}, {_constant(dim)}}}" for factor, dim in map(_extent, tensor.shape))
    names = [item.name for item in operator.inputs]
    scales = "".join(
        f", {names.index(name) if name in names else 'kNone'}"
        for name in (f"{tensor.name}_scale", f"{tensor.name}_input_scale")
        if tensor.type == "int8"
    )
    return f'{{"{tensor.name}", {_KINDS[tensor.type]}, {len(tensor.shape)}, {{{extents}}}{scales}}}'


def _extents(operator: Operator) -> Iterator[tuple[int, str]]:
    for tensor in (*operator.inputs, *operator.outputs):
        yield from map(_extent, tensor.shape)


def _extent(text: str) -> tuple[int, str]:
    """``2*inter`` → (2, ``inter``)."""
    factor, _, dim = text.rpartition("*")
    return int(factor or 1), dim


def _constant(name: str) -> str:
    """``text_gate_up`` → ``kTextGateUp``."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
