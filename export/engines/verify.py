"""The check of new engines on the GPU that they were built for, in a process of its own.

TensorRT ends the process where other libraries raise, so that an engine is tried in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.backends.cuda.driver import Device
from runtime.backends.plugin_library import VARIABLE
from runtime.bundle.manifest import DECODER_GRAPH, EngineRecord
from runtime.bundle.reader import Bundle
from runtime.console.console import Console
from runtime.errors import BackendError, BundleError, MonoedgeError

Say = Callable[[str], None]
Plans = Mapping[str, tuple[Path, EngineRecord]]
"""File and record of the plan of each graph."""


def verify(
    bundle: Bundle,
    new: Plans,
    registered: Mapping[str, EngineRecord],
    plugin: Path,
    device: Device | None,
    console: Console,
) -> None:
    """Compares new plans with what ONNX Runtime answered, where that can be done, and says what was done.

    Args:
        bundle: the bundle that they were built of.
        new: the plans to compare, of one target and chip.
        registered: plans of the bundle, of which the decoder's is used where ``new`` has none.
        plugin: the plugin library.
        device: the GPU here, if there is one.
        console: told the result.

    Raises:
        BackendError: a plan cannot be loaded, fails, or disagrees.
    """
    reason = _why_not(bundle, new, device)
    recorded = None if reason else _recorded(bundle, console)
    if reason is None and recorded is None:
        reason = f"the bundle has no recorded set, and onnxruntime, which makes it, is not here; {_remedy(bundle)}"
    if reason is None:
        plans = {**_decoder(bundle, new, registered), **new}
        reason = (
            _compare(bundle, plans, tuple(new), plugin, console)
            if DECODER_GRAPH in plans
            else "there is no decoder yet"
        )
    if reason:
        console.say(f"not checked: what the engine answers, since {reason}")


def check(bundle: Bundle, target: str | None, plugin: Path, device: Device, console: Console) -> None:
    """Compares the registered engines for a GPU.

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
        verify(bundle, plans, {}, plugin, device, console)


def _why_not(bundle: Bundle, new: Plans, device: Device | None) -> str | None:
    record = next(iter(new.values()))[1]
    if device is None:
        return f"there is no GPU here; on the device: python -m export.engine --bundle {bundle.folder} --check"
    if device.capability != record.compute_capability:
        return (
            f"it is for SM {record.compute_capability}, this GPU is SM {device.capability}; on the device: "
            f"python -m export.engine --bundle {bundle.folder} --check"
        )
    if record.max_batch > 1:
        return f"it takes {record.max_batch} conversations at once, the runtime runs one"
    return None


def _decoder(
    bundle: Bundle, new: Plans, registered: Mapping[str, EngineRecord]
) -> dict[str, tuple[Path, EngineRecord]]:
    """The registered decoder for the same chip, by the same builder."""
    first = next(iter(new.values()))[1]
    return {
        record.graph: (bundle.path(name), record)
        for name, record in registered.items()
        if (record.graph, record.target, record.compute_capability)
        == (DECODER_GRAPH, first.target, first.compute_capability)
    }


def _recorded(bundle: Bundle, console: Console) -> Bundle | None:
    """The bundle with a recorded set, made now if it has none; None where that cannot be."""
    from export.recorded import format as recording_format

    reason = recording_format.why_missing(bundle)
    if reason is None:
        return bundle
    if find_spec("onnxruntime") is None:
        return None
    from export.recorded import make as recording_make

    console.say(f"recording what ONNX Runtime answers, since {reason}")
    recording_make.put(bundle, recording_make.record(bundle, lambda size: None))
    return Bundle(bundle.folder)


def _remedy(bundle: Bundle) -> str:
    return f"where it is: python -m export.recording --bundle {bundle.folder}"


def _compare(bundle: Bundle, plans: Plans, graphs: tuple[str, ...], plugin: Path, console: Console) -> str | None:
    """Compares in another process; returns why that could not be, or None where the plans agree."""
    job = {
        "bundle": str(bundle.folder.absolute()),
        "plans": {graph: [str(path.absolute()), asdict(record)] for graph, (path, record) in plans.items()},
        "graphs": graphs,
    }
    ours = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "export.engines.verify"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": path, VARIABLE: str(plugin)},
    )
    words = [line for line in done.stderr.splitlines() if line.strip()]
    try:
        answer = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {}
    except (IndexError, ValueError):
        answer = {}
    if not answer:
        code = done.returncode
        ended = f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise BackendError(f"the process that tries the engine {ended}{': ' if words else ''}{''.join(words[-1:])}")
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
    """In the other process: what came of it."""
    from export.recorded import compare as engine_compare
    from export.recorded import format as recording_format

    try:
        from runtime.backends.tensorrt.backend import TensorRTBackend
    except MonoedgeError as error:
        return {"unavailable": str(error)}
    bundle = Bundle(job["bundle"])
    plans = {graph: (Path(path), EngineRecord(**record)) for graph, (path, record) in job["plans"].items()}
    try:
        recording = recording_format.read(bundle)
    except BundleError as error:
        return {"unavailable": str(error)}
    tokens, room = engine_compare.tokens_of(recording), plans[DECODER_GRAPH][1].max_length
    if tokens > room:
        return {"unavailable": f"it holds {room} tokens, what was recorded takes {tokens}"}
    try:
        backend = TensorRTBackend(bundle, plans=plans)
        agrees = engine_compare.compare(backend, bundle.manifest, recording, tuple(job["graphs"]))
    except MonoedgeError as error:
        return {"refused": str(error)}
    return {"agrees": agrees, "limit": engine_compare.limit(bundle.manifest), "what": backend.description}


if __name__ == "__main__":
    # What a library prints must not look like the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(_try(json.load(sys.stdin))), file=answer, flush=True)
