"""The operators' bodies, run on the numbers of a problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.quantized.quantize import block_scales, block_size, pack
from plugins_trt import function
from plugins_trt.schema import DOMAIN, EXPERTS, MATRICES, NBITS, OPERATORS, PLUGIN_OPERATORS, VERSION, Operator

from ..problems import NUMPY_TYPES, Data, Problem

FAMILIES = {operator.name: operator for operator in OPERATORS}


def problem_of(form: Operator, *sizes: Any, **more: Any) -> Problem:
    """A problem whose experts have the formats of an operator; what MatMulNBits takes is w8a16."""
    formats = {expert: "w8a16" if form.format_of(expert) == NBITS else form.format_of(expert) for expert in EXPERTS}
    return Problem(FAMILIES[form.family], *sizes, **formats, **more)


def form_of(problem: Problem) -> Operator:
    """The operator whose experts have the formats of a problem."""
    formats = (problem.operator.name, problem.text, problem.visual)
    return next(form for form in PLUGIN_OPERATORS if (form.family, form.text, form.visual) == formats)


def arrays_of(data: Data, operator: Operator, element: str) -> dict[str, np.ndarray]:
    """The inputs of the operator; INT8 matrices are packed where it wants that."""
    kind = NUMPY_TYPES[element]
    arrays = {"hidden_states": data.hidden_states[None].astype(kind), "visual_mask": data.mask[None]}
    size = block_size_of(data)
    for name, matrix in data.matrices.items():
        if matrix.scale is None:
            arrays[name] = matrix.data.astype(kind)
        elif operator.has_plugin:
            arrays |= {name: matrix.data, f"{name}_scale": matrix.scale}
            if matrix.input_scale is not None:
                arrays[f"{name}_input_scale"] = matrix.input_scale.reshape(())
        else:
            arrays[name] = pack(matrix.data, size)
            arrays[f"{name}_scale"] = block_scales(matrix.scale, matrix.data.shape[1], size).astype(kind)
    return {tensor.name: arrays[tensor.name] for tensor in operator.inputs}


def block_size_of(data: Data) -> int:
    return block_size(min(matrix.data.shape[1] for matrix in data.matrices.values()))


def body_model(data: Data, operator: Operator, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """One node of the operator and its body. Weights are initializers: what is not constant, MatMulNBits computes
    otherwise."""
    shapes = {name: data.matrices[f"text_{name}"].data.shape for name in MATRICES[operator.family]}
    sizes = {f"{name}_rows": shape[0] for name, shape in shapes.items()}
    sizes |= {f"{name}_columns": shape[1] for name, shape in shapes.items()}
    sizes |= {"bits": 8, "block_size": block_size_of(data)}
    attributes = {**operator.attributes, **{name: sizes[name] for name in operator.size_attributes}}
    node = helper.make_node(operator.name, list(arrays), ["output"], domain=DOMAIN, **attributes)
    given = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    rows = ["hidden_states", "visual_mask"]
    return helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(name, given[name], arrays[name].shape) for name in rows],
            [helper.make_tensor_value_info("output", given["hidden_states"], [1, data.problem.rows, data.problem.out])],
            [numpy_helper.from_array(arrays[name], name) for name in arrays if name not in rows],
        ),
        opset_imports=[helper.make_opsetid("", function.OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function.body(operator)],
        ir_version=11,
    )


def run_model(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """By ONNX Runtime, and in bfloat16, which it has no CPU kernels for, by ONNX's reference evaluator."""
    feeds = {name: arrays[name] for name in ("hidden_states", "visual_mask")}
    if arrays["hidden_states"].dtype == NUMPY_TYPES["bfloat16"]:
        (output,) = ReferenceEvaluator(model).run(None, feeds)
        return output[0]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0][0]


def run_body(data: Data, form: Operator | None = None, element: str | None = None) -> np.ndarray:
    """What a body makes of the numbers of a problem, [rows, out].

    Args:
        data: the problem.
        form: which operator's; by default the one with the problem's formats.
        element: what T is; by default the problem's own type.
    """
    form = form or form_of(data.problem)
    arrays = arrays_of(data, form, element or data.problem.type)
    return run_model(body_model(data, form, arrays), arrays)
