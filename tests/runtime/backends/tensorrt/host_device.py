"""A GPU in host memory, and engines on it that ONNX Runtime computes: what the TensorRT backend is tested on here.

Nothing that is enqueued happens before somebody waits for it, so that a wait too few, memory that is written too early
and an address that is wrong all show in the answer.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from export.engines.plan import Plan
from runtime.backends import graph
from runtime.backends.cuda.device import Memory
from runtime.backends.tensorrt.plan import PlanInfo, Shape, ShapeRange, TensorInfo
from runtime.errors import BackendError

Work = Callable[[], None]
POISON = 0xFF
"""Bytes of fresh memory: NaN in every format."""

_TYPES = {1: "FLOAT", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
_NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "BOOL": np.bool_, "HALF": np.float16}


class HostDevice:
    """See ``runtime.backends.cuda.device.Device``.

    Args:
        memory: bytes that can be allocated.
    """

    name = "memory of the host"
    compute_capability = 89
    stream = 1

    def __init__(self, memory: int = 1 << 40, has_graphs: bool = True) -> None:
        self.has_graphs = has_graphs
        self.free_bytes = memory
        self.queue: list[Work] = []
        self.live: set[Block] = set()
        self.waits = self.replays = self.captures = self.synchronizes = 0
        self.capture_fails = False
        self._recording: list[Work] | None = None
        self._entered = threading.local()
        self._running = threading.Lock()

    def __enter__(self) -> HostDevice:
        self._entered.depth = getattr(self._entered, "depth", 0) + 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.depth -= 1

    def require_entered(self) -> None:
        assert getattr(self._entered, "depth", 0) > 0, "the device was not entered in this thread"

    def enqueue(self, work: Work) -> None:
        self.require_entered()
        (self.queue if self._recording is None else self._recording).append(work)

    def run_next(self) -> None:
        """One at a time, in order, whoever waits."""
        with self._running:
            if self.queue:
                self.queue.pop(0)()

    def allocate(self, size: int) -> Block:
        self.require_entered()
        assert self._recording is None, "allocated while a graph is recorded"
        if size > self.free_bytes:
            raise BackendError(f"{size} bytes are needed, {self.free_bytes} are free")
        return Block(self, size)

    allocate_host = allocate

    def event(self) -> HostEvent:
        self.require_entered()
        return HostEvent(self)

    def upload(self, source: np.ndarray, address: int) -> None:
        self.enqueue(lambda: self.copy(source.ctypes.data, address, source.nbytes))

    def download(self, address: int, target: np.ndarray) -> None:
        self.enqueue(lambda: self.copy(address, target.ctypes.data, target.nbytes))

    def synchronize(self) -> None:
        self.require_entered()
        self.synchronizes += 1

    def zero(self, address: int, size: int) -> None:
        self.enqueue(lambda: self.at(address, size).fill(0))

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        def work() -> None:
            for row in range(rows):
                self.copy(source + row * source_pitch, target + row * target_pitch, width)

        self.enqueue(work)

    def capture(self, work: Work) -> HostGraph:
        self.require_entered()
        self.captures += 1
        self._recording = recorded = []
        try:
            work()
        finally:
            self._recording = None
        if self.capture_fails:
            raise BackendError("CUDA graph: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        return HostGraph(self, recorded)

    def release(self, resources: Iterable[Any]) -> None:
        with self:
            for resource in resources:
                resource.free()

    def copy(self, source: int, target: int, size: int) -> None:
        self.at(target, size)[:] = self.at(source, size)

    def at(self, address: int, size: int) -> np.ndarray:
        """Memory at an address, which must lie within one live block."""
        assert any(b.address <= address and address + size <= b.address + b.size for b in self.live), (
            f"{size} bytes at {address} are not allocated"
        )
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Block:
    """Memory, of the host or of the device; begins at a multiple of 256."""

    def __init__(self, device: HostDevice, size: int) -> None:
        buffer = np.full(size + 256, POISON, np.uint8)
        begin = -buffer.ctypes.data % 256
        self.array = buffer[begin : begin + size]
        self.address, self.size, self._device = self.array.ctypes.data, size, device
        device.free_bytes -= size
        device.live.add(self)

    def free(self) -> None:
        self._device.require_entered()
        self._device.live.remove(self)
        self._device.free_bytes += self.size


class HostEvent:
    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._reached = True

    def record(self) -> None:
        marker = object()
        self._marker, self._reached = marker, False

        def reach() -> None:
            if self._marker is marker:
                self._reached = True

        self._device.enqueue(reach)

    def wait(self) -> None:
        self._device.require_entered()
        self._device.waits += not self._reached
        while not self._reached:
            self._device.run_next()

    def free(self) -> None:
        assert self._reached, "freed while it is waited for"


class HostGraph:
    def __init__(self, device: HostDevice, work: list[Work]) -> None:
        self._device, self._work = device, work

    def replay(self) -> None:
        self._device.replays += 1
        for work in self._work:
            self._device.enqueue(work)

    def free(self) -> None:
        self._work.clear()


class Executor(Protocol):
    """What engines need of a device in host memory; ``HostDevice`` describes it."""

    def require_entered(self) -> None: ...

    def enqueue(self, work: Work) -> None: ...

    def at(self, address: int, size: int) -> np.ndarray: ...


class HostEngine:
    """A plan's graph, computed by ONNX Runtime on the memory that is bound."""

    def __init__(self, device: Executor, plan: Plan, path: str, scratch: int = 1000) -> None:
        self.device = device
        self.info = plan_info(plan, scratch)
        self.executions: list[HostExecution] = []
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execution(self, profile: int, scratch: Memory, static: bool) -> HostExecution:
        self.device.require_entered()
        assert scratch.size >= self.info.scratch
        assert scratch.address % 256 == 0
        self.executions.append(HostExecution(self, profile, scratch, static))
        return self.executions[-1]

    def run(self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """What a GPU would do when it comes to this work."""
        given = {tensor.name: tensor for tensor in self.info.tensors}
        feeds = {}
        for name, shape in shapes.items():
            range_ = given[name].ranges[profile]
            assert all(
                low <= size <= high for low, size, high in zip(range_.minimum, shape, range_.maximum, strict=True)
            ), f"{name} {shape} is not within profile {profile}: {range_}"
            assert addresses[name] % 256 == 0, name
            dtype = np.dtype(_NUMPY[given[name].type])
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = self.device.at(addresses[name], size).view(dtype).reshape(shape).copy()
        names = [output.name for output in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            alias = given[name].alias
            assert alias is None or addresses[alias] == addresses[name], f"{name} does not lie where {alias} does"
            self.device.at(addresses[name], value.nbytes)[:] = value.reshape(-1).view(np.uint8)


class HostExecution:
    def __init__(self, engine: HostEngine, profile: int, scratch: Memory, static: bool) -> None:
        self.engine, self.profile, self.scratch, self.static = engine, profile, scratch, static
        self.capturable = True
        self.enqueued = 0
        self.tokens: list[int] = []
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        assert not (self.static and self._shapes), "shapes that would never change did"
        self._shapes |= shapes

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        assert not (self.static and self._addresses), "addresses that a graph may have recorded changed"
        self._addresses |= addresses

    def enqueue(self) -> None:
        self.enqueued += 1
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        self.tokens += shapes.get(graph.POSITION_IDS, ())[1:]
        assert set(shapes) | {tensor.name for tensor in self.engine.info.tensors} == set(addresses)

        def work() -> None:
            # Whoever ran before left something there.
            self.engine.device.at(self.scratch.address, self.scratch.size).fill(POISON)
            self.engine.run(self.profile, shapes, addresses)

        self.engine.device.enqueue(work)

    def free(self) -> None:
        self._addresses.clear()


def plan_info(plan: Plan, scratch: int) -> PlanInfo:
    """What an engine of a plan would say, from the graph and the profiles that ``export.engine`` builds it of."""

    def tensor(value: Any, is_input: bool) -> TensorInfo:
        kind = value.type.tensor_type
        alias = graph.PAST + value.name.removeprefix(graph.PRESENT) if value.name.startswith(graph.PRESENT) else None
        ranges = [profile[value.name] for profile in plan.profiles] if is_input else []
        return TensorInfo(
            value.name,
            is_input,
            _TYPES[kind.elem_type],
            tuple(size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim),
            tuple(ShapeRange(shapes.minimum, shapes.optimum, shapes.maximum) for shapes in ranges),
            alias,
        )

    inputs = [tensor(value, True) for value in plan.model.graph.input]
    return PlanInfo((*inputs, *(tensor(value, False) for value in plan.model.graph.output)), scratch)
