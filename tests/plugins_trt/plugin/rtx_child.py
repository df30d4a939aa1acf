"""Parses and builds one model with TensorRT for RTX, in a process of its own: it aborts where others raise.

Reads a job from standard input and writes what happened to standard output, both as JSON; ``conftest.py`` calls it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.WARNING or "[monoedge]" in message:
            self.lines.append((severity.name, message))


def run(job: dict[str, Any], log: Log) -> dict[str, Any]:
    registry = trt.get_plugin_registry()
    result: dict[str, Any] = {"loaded": registry.load_library(job["library"]) is not None}
    result["creators"] = [
        [creator.name, creator.plugin_version, creator.plugin_namespace, [field.name for field in creator.field_names]]
        for creator in registry.all_creators
        if creator.plugin_namespace == job["namespace"]
    ]
    if job.get("model") is None:
        return result
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    with open(job["model"], "rb") as file:  # noqa: PTH123 - nothing here but TensorRT
        result["parsed"] = parser.parse(file.read(), job["path"])
    result["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    result["layers"] = [[layer.name, layer.type.name] for layer in layers]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    result["outputs"] = {tensor.name: [tensor.dtype.name, list(tensor.shape)] for tensor in outputs}
    result["plan"] = None
    if not result["parsed"] or not job["capability"]:
        return result
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, job["capability"]), 0)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    result["profiles"] = config.num_optimization_profiles
    plan = builder.build_serialized_network(network, config)
    result["plan"] = plan.nbytes if plan is not None else None
    return result


if __name__ == "__main__":
    lines = Log()
    answer = run(json.load(sys.stdin), lines)
    json.dump({**answer, "log": lines.lines}, sys.stdout)
