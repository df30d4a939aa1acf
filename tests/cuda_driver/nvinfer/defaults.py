"""Writes ``defaults.h``: TensorRT's interfaces with every call answered by nothing, made from NVIDIA's public headers.

TensorRT's objects are tables of functions that its Python module calls by their place. The headers say which place is
whose, so that the library of this folder implements only the calls that matter here.
"""

from __future__ import annotations

import re
from pathlib import Path

INTERFACES = {
    "VRuntime": ("NvInferImpl.h", "apiv::VRuntime"),
    "VCudaEngine": ("NvInferImpl.h", "apiv::VCudaEngine"),
    "VExecutionContext": ("NvInferImpl.h", "apiv::VExecutionContext"),
    "VRuntimeConfig": ("NvInferImpl.h", "apiv::VRuntimeConfig"),
    "IPluginRegistry": ("NvInferRuntimeCommon.h", "IPluginRegistry"),
}
"""What the library implements: the header that declares it, and its full name."""

_PURE = re.compile(r"(?:TRT_DEPRECATED |TRT_NODISCARD )*virtual ([^;=]*?)\s*= 0;", re.DOTALL)


def defaults(headers: Path) -> str:
    """Returns the text of ``defaults.h``.

    Args:
        headers: the folder of TensorRT's headers.
    """
    # The headers name types of their own namespace without it.
    lines = ["// Made by defaults.py from NVIDIA's headers.", "#pragma once", "#include <NvInfer.h>", ""]
    lines += ["using namespace nvinfer1;", ""]
    for name, (file, base) in INTERFACES.items():
        lines += [f"struct Default{name} : nvinfer1::{base}", "{"]
        lines += [f"    {_override(method)}" for method in _PURE.findall(_body((headers / file).read_text(), name))]
        lines += ["};", ""]
    return "\n".join(lines)


def _body(text: str, name: str) -> str:
    """Returns what stands in a class, without comments, default arguments and what is compiled only on request."""
    found = re.search(rf"^class {name}\b[^;{{]*\{{(.*?)^\}};", text, re.DOTALL | re.MULTILINE)
    assert found, f"class {name} is not in the header"
    body = re.sub(r"#if.*?#endif[^\n]*", "", found[1].replace(' = ""', ""), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", body)


def _override(method: str) -> str:
    """Returns a method that answers with a zero of its type."""
    declaration = " ".join(method.split())
    found = re.match(r"(.*?)\b\w+\(", declaration)
    assert found, declaration
    kind = found[1].strip()
    if kind.endswith("&"):
        answer = f"static char none[64]; return *reinterpret_cast<{kind[:-1].strip()}*>(none);"
    else:
        answer = "" if kind == "void" else "return {};"
    return f"{declaration} override {{ {answer} }}"
