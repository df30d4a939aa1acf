"""Compares engines with what was recorded, on the GPU that they were built for, in a process of its own.

TensorRT ends the process where other libraries raise: so an engine that fails ends the other process, and is reported.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export.recorded import compare as engine_compare
from export.recorded import format as recording_format
from runtime.backends.cuda.driver import Device
from runtime.backends.plugin_library import VARIABLE
from runtime.bundle.engines import Plans
from runtime.bundle.manifest import DECODER_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.console.children import child_environment, how_it_ended
from runtime.console.console import Console
from runtime.errors import BackendError, BundleError, MonoedgeError


def verify(bundle: Bundle, new: Plans, plugin: Path | None, device: Device | None, console: Console) -> None:
    """Compares plans with what ONNX Runtime answered, where that is possible, and says what was done.

    The plans are of one target and GPU. Without a decoder among them, the registered one is used.

    Raises:
        BackendError: a plan cannot be loaded, fails, or disagrees.
    """
    reason = (
        _why_not_here(bundle, new, device) or _why_unrecorded(bundle, console) or _compare(bundle, new, plugin, console)
    )
    if reason:
        console.say(f"not checked: what the engine answers, since {reason}")


def check(bundle: Bundle, target: str | None, plugin: Path | None, device: Device, console: Console) -> None:
    """Compares the registered engines for a GPU, those of one target or of all.

    Raises:
        BundleError: there are none.
        BackendError: one cannot be loaded, fails, or disagrees.
    """
    found: dict[str, dict[str, tuple[Path, EngineRecord]]] = {}
    for name, record in bundle.manifest.engines.items():
        if record.compute_capability == device.capability and target in (None, record.target):
            found.setdefault(record.target, {})[record.graph] = (bundle.path(name), record)
    if not found:
        wanted = f"{target} and " if target else ""
        raise BundleError(f"{bundle.folder} has no engines for {wanted}SM {device.capability}, {device.name}")
    for name, plans in found.items():
        console.say(f"checking {name}, SM {device.capability}")
        verify(bundle, plans, plugin, device, console)


def _why_not_here(bundle: Bundle, new: Plans, device: Device | None) -> str | None:
    record = next(iter(new.values()))[1]
    later = f"on the device: python -m export.engine --bundle {shlex.quote(str(bundle.folder))} --check"
    if device is None:
        return f"there is no GPU here; {later}"
    if device.capability != record.compute_capability:
        return f"it is for SM {record.compute_capability}, this GPU is SM {device.capability}; {later}"
    if record.max_batch > 1:
        return f"it takes {record.max_batch} conversations at once, the runtime runs one"
    return None


def _why_unrecorded(bundle: Bundle, console: Console) -> str | None:
    """Makes the recorded set of a bundle that has none; says why that cannot be."""
    reason = recording_format.why_missing(bundle)
    if reason is None:
        return None
    if find_spec("onnxruntime") is None:
        return (
            "the bundle has no recorded set, and onnxruntime, which makes it, is not installed here; where it is: "
            + recording_format.command(bundle)
        )
    from export.recorded import make as recording_make

    console.say(f"recording what ONNX Runtime answers, since {reason}")
    recording_make.put(bundle, recording_make.record(bundle, lambda size: None))
    return None


def _compare(bundle: Bundle, new: Plans, plugin: Path | None, console: Console) -> str | None:
    """Compares in another process; says why that is impossible."""
    first = next(iter(new.values()))[1]
    wanted = (DECODER_GRAPH, first.target, first.compute_capability)
    plans = {
        record.graph: (bundle.path(name), record)
        for name, record in bundle.manifest.engines.items()
        if (record.graph, record.target, record.compute_capability) == wanted
    } | dict(new)
    if DECODER_GRAPH not in plans:
        return "there is no decoder yet"
    job = {
        "bundle": str(bundle.folder.absolute()),
        "plans": {graph: [str(path.absolute()), asdict(record)] for graph, (path, record) in plans.items()},
        "graphs": tuple(new),
    }
    done = subprocess.run(
        [sys.executable, "-m", "export.engines.verify"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=child_environment() | ({} if plugin is None else {VARIABLE: str(plugin)}),
    )
    if done.returncode or not done.stdout:
        printed = [line for line in done.stderr.splitlines() if line.strip()]
        ended = how_it_ended(done.returncode, "".join(printed[-1:]))
        raise BackendError(f"the process that tries the engine {ended}")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise BackendError(answer["refused"])
    if "agrees" in answer:
        figures = ", ".join(f"{graph} {ratio:.0f} dB" for graph, ratio in answer["agrees"].items())
        console.say(
            f"checked: answers as ONNX Runtime does ({figures}; at least {answer['limit']:.0f}), {answer['what']}"
        )
        return None
    return str(answer["unavailable"])


def _try(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in the other process: compares, and returns what came of it."""
    bundle = Bundle(job["bundle"])
    try:
        from runtime.backends.tensorrt.backend import TensorRTBackend

        recording = recording_format.read(bundle)
    except MonoedgeError as error:
        return {"unavailable": str(error)}
    plans = {graph: (Path(path), EngineRecord(**record)) for graph, (path, record) in job["plans"].items()}
    tokens, room = engine_compare.tokens_of(recording[DECODER_GRAPH]), plans[DECODER_GRAPH][1].max_length
    if tokens > room:
        return {"unavailable": f"it holds {room} tokens, what was recorded takes {tokens}"}
    try:
        backend = TensorRTBackend(bundle, plans=plans)
        agrees = engine_compare.compare(backend, bundle.manifest, recording, tuple(job["graphs"]))
    except MonoedgeError as error:
        return {"refused": str(error)}
    return {"agrees": agrees, "limit": engine_compare.LIMITS[bundle.manifest.precision], "what": backend.description}


if __name__ == "__main__":
    # What a library prints must not look like the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(_try(json.load(sys.stdin))), file=answer, flush=True)
