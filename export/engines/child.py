"""Builds one plan, in a process of its own: ``export.engines.process`` starts it.

TensorRT ends the process where other libraries raise, and TensorRT for RTX finds its own library only by an
environment variable that is read when a process starts. So whoever builds must be able to lose this process.

Standard input: the job as one line of JSON, then the graph. Standard output: events, one JSON object a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.writer import HashingFile
from runtime.backends.tensorrt.library import load_plugins, make_logger
from runtime.console.files import replaced

# TensorRT's module is known when it is chosen, so that everything of it is Any here.
# ruff: noqa: ANN401

Event = Callable[..., None]

_BLOCK = 1 << 24
_INTERVAL = 0.1
"""Seconds between two reports of progress."""


class BuildError(Exception):
    """The job cannot be done. The message says why, or else what TensorRT reported does."""

    def __init__(self, message: str, reported: bool = False) -> None:
        super().__init__(message)
        self.reported = reported


def build(job: Mapping[str, Any], graph: bytes, event: Event) -> None:
    """Parses a graph, builds a plan and writes it to ``job["plan"]``.

    Raises:
        BuildError: a step that failed; TensorRT's own words were reported as events.
    """
    try:
        trt = importlib.import_module(job["module"])
    except ImportError as error:
        raise BuildError(f"{job['module']} is installed, but cannot be imported: {error}") from None
    logger = make_logger(trt, lambda message: event(error=message))
    # Without a logger of ours the first one would print.
    builder = trt.Builder(logger)
    if job["plugin"]:
        wrong = load_plugins(trt, job["plugin"], job["operators"])
        if wrong:
            raise BuildError(wrong, reported=True)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, logger)
    missing = sorted(name for name in job["standard_operators"] if not parser.supports_operator(name))
    if missing:
        raise BuildError(
            f"the ONNX parser of {job['title']} {trt.__version__} does not have {', '.join(missing)}: {job['needs']}"
        )
    event(phase="parsing", fraction=0.0)
    if not parser.parse(graph, job["graph"]):
        raise _parse_error(parser)
    config = builder.create_builder_config()
    if job["capability"]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job["capability"]), 0)
    config.progress_monitor = _monitor(trt, event)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in shapes.items():
            profile.set_shape(name, minimum, optimum, maximum)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError("refused an optimization profile", reported=True)
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    if cache is not None:
        _use_timing_cache(config, cache, event)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError("could not build the plan", reported=True)
    _write(plan, Path(job["plan"]), event)
    if cache is not None:
        _keep_timing_cache(config, cache, event)
    event(done=trt.__version__)


def _creation_flags(trt: Any) -> int:
    # Types come from the graph; from TensorRT 11 on that is the only way there is.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse_error(parser: Any) -> BuildError:
    error = parser.get_error(0) if parser.num_errors else None
    if error is None or not error.node_operator():
        return BuildError("could not parse the graph", reported=True)
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return BuildError(f"could not parse {node}: {error.desc().splitlines()[0]}")


def _monitor(trt: Any, event: Event) -> Any:
    """Phases within phases, told as one fraction. TensorRT calls from several threads, one at a time."""

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
    """How much is done, of phases of which each is one step of the one before: [steps done, steps]."""
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
        event(note=f"{file} is of another TensorRT or GPU, and is started anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timing_cache(config: Any, file: Path, event: Event) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as partial:
            partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
    except OSError as error:
        # The plan is there; the next build only takes longer.
        event(note=f"{file} was not written: {error.strerror}")


def _write(plan: Any, path: Path, event: Event) -> None:
    data = memoryview(plan).cast("B")
    try:
        file = HashingFile(path)
        for start in range(0, len(data), _BLOCK):
            file.write(data[start : start + _BLOCK])
        file.close()
    except OSError as error:
        raise BuildError(f"could not write {path.parent}: {error.strerror}") from None
    record = file.record()
    event(size=record.size, sha256=record.sha256)


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
    except BuildError as error:
        event(failed=str(error), reported=error.reported)


if __name__ == "__main__":
    main()
