"""The definition of the operators for C++: ``python -m plugins_trt.header`` writes ``plugins_trt/trt/schema.h``.

The file is kept under version control, so that a device builds the plugin without Python. A test compares it with
``plugins_trt.schema``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from plugins_trt.schema import DOMAIN, PLUGIN_OPERATORS, VERSION, Operator, Tensor

HEADER = Path(__file__).parent / "trt/schema.h"

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

// Most tensors are the same in several operators.
{tensors}

inline constexpr Operator kOperators[]{{
{operators}
}};

}} // namespace monoedge::schema
"""


def header() -> str:
    """Returns the text of ``schema.h``."""
    tensors = {
        _name(tensor): tensor for operator in PLUGIN_OPERATORS for tensor in (*operator.inputs, *operator.outputs)
    }
    dims = list(dict.fromkeys(dim for tensor in tensors.values() for _, dim in map(_extent, tensor.shape)))
    return _TEXT.format(
        namespace=DOMAIN,
        version=VERSION,
        dims=_constants(dims),
        dim_names=", ".join(f'"{dim}"' for dim in dims),
        tensors="\n".join(f"inline constexpr Tensor {name}{_tensor(tensor)};" for name, tensor in tensors.items()),
        operators="\n".join(map(_operator, PLUGIN_OPERATORS)),
    )


def _operator(operator: Operator) -> str:
    if len(operator.outputs) != 1:
        raise ValueError(f"{operator.name} has {len(operator.outputs)} outputs: the plugin is written for one")
    output, *inputs = map(_name, (*operator.outputs, *operator.inputs))
    text = f'{{"{operator.name}", Family::k{operator.family}, {output}, {len(inputs)}, {{{", ".join(inputs)}}}}},'
    return textwrap.fill(text, 120, initial_indent="    ", subsequent_indent="        ")


def _name(tensor: Tensor) -> str:
    if tensor.name == "output":
        return f"output_{tensor.shape[-1]}"
    return f"{tensor.name}_int8" if tensor.type == "int8" else tensor.name


def _tensor(tensor: Tensor) -> str:
    extents = ", ".join(f"{{{factor}, {_constants([dim])}}}" for factor, dim in map(_extent, tensor.shape))
    return f'{{"{tensor.name}", Kind::{_constants([tensor.type])}, {len(tensor.shape)}, {{{extents}}}}}'


def _extent(text: str) -> tuple[int, str]:
    """``2*inter`` → (2, ``inter``)."""
    factor, _, dim = text.rpartition("*")
    return int(factor or 1), dim


def _constants(names: Iterable[str]) -> str:
    """``text_gate_up``, ``in`` → ``kTextGateUp, kIn``."""
    return ", ".join("k" + "".join(part.capitalize() for part in name.split("_")) for name in names)


if __name__ == "__main__":
    HEADER.write_text(header(), encoding="utf-8")
