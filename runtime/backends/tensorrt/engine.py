"""Engines through TensorRT's Python module. Tests have engines of the same shape that run on the CPU."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.backends.cuda.device import Device, Memory
from runtime.backends.tensorrt.library import TensorRT
from runtime.backends.tensorrt.plan import PlanInfo, Shape, ShapeRange, TensorInfo
from runtime.bundle.targets import Target
from runtime.errors import BackendError

# TensorRT's module is known when it is chosen, so that everything of it is Any here.
# ruff: noqa: ANN401


class TensorRTRuntime(TensorRT):
    """A TensorRT that runs plans.

    Args:
        target: which.

    Raises:
        BackendError: it cannot be imported, or does not start.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        with self.listening():
            try:
                self._runtime = self.trt.Runtime(self.logger)
            except TypeError:  # as a constructor tells that it made nothing
                raise self.error("cannot start") from None

    def load(self, plan: Path, device: Device) -> Engine:
        """Loads a plan onto the GPU, which is entered.

        Raises:
            BackendError: the file cannot be read, or TensorRT refuses it.
        """
        with self.listening():
            try:
                # Mapped: on a small board there is no room for a copy of the weights beside those of the GPU.
                with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    engine = self._runtime.deserialize_cuda_engine(data)
            except (OSError, ValueError) as error:
                raise BackendError(f"{plan} cannot be read: {error}") from None
            if engine is None:
                raise self.error(f"cannot load {plan}")
        return Engine(self, engine, device)


class Engine:
    """A loaded plan."""

    def __init__(self, tensorrt: TensorRT, engine: Any, device: Device) -> None:
        self.info = plan_info(tensorrt.trt, engine)
        self._tensorrt, self._engine, self._device = tensorrt, engine, device

    def execution(self, profile: int, scratch: Memory, static: bool) -> Execution:
        """Makes a way to run it.

        Args:
            profile: index of an optimization profile.
            scratch: memory for activations, at least ``info.scratch`` bytes. Executions may share it if no two run at
                once, as on one queue.
            static: whether its shapes never change, so that more preparation pays off.
        """
        with self._tensorrt.listening():
            return self._execution(profile, scratch, static)

    def _execution(self, profile: int, scratch: Memory, static: bool) -> Execution:
        trt, engine = self._tensorrt.trt, self._engine
        own_memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(own_memory)
            if static and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
                # TensorRT for RTX compiles on the device: for these shapes now, not while a stand-in runs.
                strategies = trt.DynamicShapesKernelSpecializationStrategy
                config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(own_memory)
        if context is None:
            raise self._tensorrt.error("cannot make an execution context")
        context.set_device_memory(scratch.address, scratch.size)
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise self._tensorrt.error(f"refuses optimization profile {profile}")
        return Execution(self._tensorrt, context, self._device.stream)


class Execution:
    """One way to run an engine: a profile, with shapes and addresses that stay until they are set again."""

    def __init__(self, tensorrt: TensorRT, context: Any, stream: int) -> None:
        self._tensorrt, self._context, self._stream = tensorrt, context, stream

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Sets shapes of inputs."""
        with self._tensorrt.listening():
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise self._tensorrt.error(f"refuses the shape {list(shape)} of {name}")

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Sets device addresses of inputs and outputs."""
        with self._tensorrt.listening():
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._tensorrt.error(f"refuses the memory of {name}")

    def enqueue(self) -> None:
        """Enqueues the work on the device's queue."""
        with self._tensorrt.listening():
            if not self._context.execute_async_v3(self._stream):
                raise self._tensorrt.error("failed")

    @property
    def capturable(self) -> bool:
        """Whether ``Device.capture`` may record ``enqueue`` now: only TensorRT for RTX ever says no."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream))

    def free(self) -> None:
        """Frees it: TensorRT frees an execution context with its object."""
        del self._context


def plan_info(trt: Any, engine: Any) -> PlanInfo:
    """Reads the tensors and profiles of an engine."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return PlanInfo(tuple(_tensor_info(trt, engine, name) for name in names), int(engine.device_memory_size_v2))


def _tensor_info(trt: Any, engine: Any, name: str) -> TensorInfo:
    # TensorRT 10.3 has neither this call nor an operator that writes in place.
    aliased = getattr(engine, "get_aliased_input_tensor", lambda name: None)
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    profiles: Iterable[int] = range(engine.num_optimization_profiles) if is_input else ()
    return TensorInfo(
        name,
        is_input,
        engine.get_tensor_dtype(name).name,
        tuple(engine.get_tensor_shape(name)),
        tuple(ShapeRange(*map(tuple, engine.get_tensor_profile_shape(name, index))) for index in profiles),
        None if is_input else aliased(name),
        engine.get_tensor_location(name) == trt.TensorLocation.HOST,
    )
