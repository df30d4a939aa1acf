"""Builds one plan, in a process of its own: ``export.engines.process`` starts it.

TensorRT ends the process where other libraries raise, and TensorRT for RTX finds its own library only by an
environment variable that is read when a process starts.

Standard input: the job as one line of JSON, then the graph. Standard output: events, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from export.writer import HashingFile
from runtime.backends.tensorrt.library import TensorRT
from runtime.bundle.targets import TARGETS
from runtime.console.files import replaced
from runtime.errors import BackendError, MonoedgeError

# TensorRT's module is known when it is chosen, so that everything of it is Any here.
# ruff: noqa: ANN401

Event = Callable[..., None]

_INTERVAL = 0.1
"""Seconds between two reports of progress."""


def build(job: Mapping[str, Any], graph: bytes, event: Event) -> None:
    """Parses a graph, builds a plan and writes it to ``job["plan"]``.

    Raises:
        BackendError: a step failed, with what TensorRT logged.
    """
    target = TARGETS[job["target"]]
    tensorrt = TensorRT(target, lambda message: event(error=message))
    trt = tensorrt.trt
    # First, with our logger: whatever is made without one prints.
    builder = trt.Builder(tensorrt.logger)
    tensorrt.load_plugins(Path(job["library"]), job["plugins"])
    # Types come from the graph; from TensorRT 11 on that is the only way there is.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, tensorrt.logger)
    missing = sorted(name for name in job["standard_operators"] if not parser.supports_operator(name))
    if missing:
        raise tensorrt.error(f"its ONNX parser does not have {', '.join(missing)}", target.needs)
    event(phase="parsing", fraction=0.0)
    with tensorrt.listening():
        if not parser.parse(graph, job["graph"]):
            raise _parse_error(tensorrt, parser)
    config = builder.create_builder_config()
    if target.capabilities:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job['capability']}"), 0)
    config.progress_monitor = _monitor(trt, event)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in shapes.items():
            profile.set_shape(name, minimum, optimum, maximum)
        with tensorrt.listening():
            if config.add_optimization_profile(profile) < 0:
                raise tensorrt.error("refused an optimization profile")
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    if cache is not None:
        _use_timing_cache(config, cache, event)
    with tensorrt.listening():
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise tensorrt.error("could not build the plan")
    _write(plan, Path(job["plan"]), event)
    if cache is not None:
        _keep_timing_cache(config, cache, event)
    event(done=tensorrt.version)


def _parse_error(tensorrt: TensorRT, parser: Any) -> BackendError:
    error = parser.get_error(0) if parser.num_errors else None
    if error is None or not error.node_operator():
        return tensorrt.error("could not parse the graph")
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return tensorrt.error(f"could not parse {node}", error.desc().splitlines()[0])


def _monitor(trt: Any, event: Event) -> Any:
    """Reports nested phases as one fraction. TensorRT calls from several threads, one at a time."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = [0, max(steps, 1)]
            self.tell(name)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.phases:
                self.phases[name][0] = step + 1
            self.tell(name)
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

        def tell(self, name: str) -> None:
            now = time.monotonic()
            if now - self.told >= _INTERVAL:
                self.told = now
                event(phase=name, fraction=fraction(list(self.phases.values())))

    return Monitor()


def fraction(phases: list[list[int]]) -> float:
    """Returns how much is done of nested phases, [steps done, steps] each; a phase is one step of the one before it."""
    done = 0.0
    for finished, steps in reversed(phases):
        done = min(finished + done, steps) / steps
    return done


def _use_timing_cache(config: Any, file: Path, event: Event) -> None:
    try:
        data = file.read_bytes()
    except OSError:
        data = b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        event(note=f"{file} was made by another TensorRT or on another GPU: its measurements are not used")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timing_cache(config: Any, file: Path, event: Event) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as partial:
            partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
    except OSError as error:
        # The plan is there all the same.
        event(note=f"{file} could not be written ({error.strerror}): the next build measures again")


def _write(plan: Any, path: Path, event: Event) -> None:
    try:
        with closing(HashingFile(path)) as file:
            file.write(memoryview(plan))
    except OSError as error:
        raise BackendError(f"could not write {path.parent}: {error.strerror}") from None
    event(**vars(file.record()))


def main() -> None:
    """Reads a job from standard input and does it."""
    # The parent speaks to the user when it is interrupted; this process just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What a library prints must not look like an event.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    lock = threading.Lock()

    def event(**values: object) -> None:
        try:
            with lock:
                events.write(json.dumps(values) + "\n")
        except BrokenPipeError:
            # Whoever wanted the plan is gone.
            os._exit(1)

    job = json.loads(sys.stdin.buffer.readline())
    try:
        build(job, sys.stdin.buffer.read(), event)
    except MonoedgeError as error:
        event(failed=str(error))


if __name__ == "__main__":
    main()
