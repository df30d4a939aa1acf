"""Parses a plan's graph with TensorRT for RTX, in a process of its own, and says what the backend would read of it.

The job comes on standard input and the answer goes to standard output, as JSON. There is no engine without a GPU, so a
network and its profiles stand in for one: they have all that ``plan_info`` asks.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import tensorrt_rtx as trt

from runtime.backends.tensorrt.engine import plan_info


class NetworkAsEngine:
    """A network with its profiles, asked as ``ICudaEngine`` is."""

    device_memory_size_v2 = 0

    def __init__(self, network: Any, profiles: list[Any]) -> None:
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        self._tensors = {tensor.name: tensor for tensor in (*inputs, *outputs)}
        self._profiles = profiles
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        self._aliases = {
            layer.get_output(0).name: layer.get_input(0).name
            for layer in layers
            if layer.type == trt.LayerType.KV_CACHE_UPDATE
        }
        self.num_io_tensors, self.num_optimization_profiles = len(self._tensors), len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if self._tensors[name].is_network_input else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> Any:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return self._profiles[index].get_shape(name)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.HOST if self._tensors[name].is_shape_tensor else trt.TensorLocation.DEVICE


def read(job: dict[str, Any], graph: bytes) -> dict[str, Any]:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    trt.get_plugin_registry().load_library(job["plugin"])
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph, job["graph"]), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profiles = []
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in shapes.items():
            profile.set_shape(name, minimum, optimum, maximum)
        profiles.append(profile)
    return asdict(plan_info(trt, NetworkAsEngine(network, profiles)))


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline())
    json.dump(read(request, sys.stdin.buffer.read()), out)
