"""Engines through TensorRT's Python module. Tests have engines of the same shape that run on the CPU."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.backends.cuda.device import Device, Memory
from runtime.backends.tensorrt.library import TensorRT
from runtime.backends.tensorrt.plan import PlanInfo, Shape, ShapeRange, TensorInfo
from runtime.backends.tensorrt.runtime_cache import RuntimeCacheFile
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

    def load(self, plan: Path, device: Device, sha256: str) -> Engine:
        """Loads a plan onto the GPU, which is entered.

        Args:
            plan: the file.
            device: the GPU.
            sha256: that of the plan.

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
        made_for = {
            "tensorrt": self.version,
            "gpu": f"{device.name}, SM {device.compute_capability}",
            "plan": sha256,
        }
        return Engine(self, engine, device, RuntimeCacheFile(plan, made_for))


class Engine:
    """A loaded plan.

    Args:
        tensorrt: what loaded it.
        engine: TensorRT's.
        device: the GPU.
        cache_file: keeps what TensorRT for RTX compiles.
    """

    def __init__(self, tensorrt: TensorRT, engine: Any, device: Device, cache_file: RuntimeCacheFile) -> None:
        self.info = plan_info(tensorrt.trt, engine)
        # They go in this order: TensorRT's objects must not outlive what made them.
        self._cache: Any = None
        self._configs: dict[bool, Any] = {}
        self._engine, self._tensorrt, self._device = engine, tensorrt, device
        self._cache_file, self._kept = cache_file, b""
        self._ran: set[tuple[int, bool]] = set()

    def execution(self, profile: int, scratch: Memory, static: bool) -> Execution:
        """Makes a way to run it.

        Args:
            profile: index of an optimization profile.
            scratch: memory for activations, at least ``info.scratch`` bytes. Executions may share it if no two run at
                once, as on one queue.
            static: whether its shapes never change, so that more preparation pays off.
        """
        with self._tensorrt.listening():
            if hasattr(self._engine, "create_runtime_config"):
                if static not in self._configs:
                    self._configs[static] = self._config(static)
                context = self._engine.create_execution_context(self._configs[static])
            else:  # TensorRT 10.3
                strategies = self._tensorrt.trt.ExecutionContextAllocationStrategy
                context = self._engine.create_execution_context(strategies.USER_MANAGED)
            if context is None:
                raise self._tensorrt.error("cannot make an execution context")
            context.set_device_memory(scratch.address, scratch.size)
            if not context.set_optimization_profile_async(profile, self._device.stream):
                raise self._tensorrt.error(f"refuses optimization profile {profile}")
        return Execution(self._tensorrt, context, self._device.stream, lambda: self._ran_first(profile, static))

    def _config(self, static: bool) -> Any:
        trt, config = self._tensorrt.trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT for RTX has kernels for any shape, and can compile faster ones for each shape that comes. EAGER:
            # before its first run, which pays off for what runs for every token. NONE: never. LAZY, which it does if
            # not told, compiles in a thread beside the work, and keeps the kernels: for each length of a prompt anew,
            # which seldom comes again.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if static else strategies.NONE
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                kept = self._cache_file.read()
                # It looks for itself whether the driver and the GPU are those that it compiled for.
                if kept is not None and self._cache.deserialize(kept):
                    self._kept = kept
            config.set_runtime_cache(self._cache)
        return config

    def _ran_first(self, profile: int, static: bool) -> None:
        """Keeps what was compiled for a profile; later executions of it compile nothing."""
        if self._cache is None or (profile, static) in self._ran:
            return
        self._ran.add((profile, static))
        compiled = self._cache.serialize()
        if compiled is not None and (data := bytes(memoryview(compiled))) != self._kept:
            self._cache_file.write(data)
            self._kept = data


class Execution:
    """One way to run an engine: a profile, with shapes and addresses that stay until they are set again."""

    def __init__(self, tensorrt: TensorRT, context: Any, stream: int, on_first_run: Callable[[], None]) -> None:
        self._tensorrt, self._context, self._stream = tensorrt, context, stream
        self._on_first_run, self._has_run = on_first_run, False

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
        """Enqueues the work on the device's queue; the first time not while a graph is recorded."""
        with self._tensorrt.listening():
            if not self._context.execute_async_v3(self._stream):
                raise self._tensorrt.error("failed")
        if not self._has_run:
            self._has_run = True
            self._on_first_run()

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
