"""Starts the process that builds a plan, listens to it, and ends it with this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from export.engines.options import Options
from export.engines.plan import Plan
from runtime.backends.tensorrt.library import NAMESPACE
from runtime.bundle.manifest import FileRecord
from runtime.bundle.targets import Target
from runtime.console.children import child_environment, how_it_ended
from runtime.console.console import Console
from runtime.errors import BackendError


def build_plan(plan: Plan, options: Options, graph: Path, output: Path, console: Console) -> tuple[FileRecord, str]:
    """Builds a plan into a file, ``output``. The weights lie beside ``graph``, the original of the plan's graph.

    Returns:
        Size and hash of the plan, and the version of TensorRT.

    Raises:
        BackendError: the plan could not be built, with the first error that TensorRT logged.
    """
    job = {
        "target": options.target.name,
        "library": str(options.plugin),
        "plugins": plan.plugins,
        "standard_operators": plan.standard_operators,
        "graph": str(graph.absolute()),
        "capability": options.capability,
        "profiles": plan.profiles,
        "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
        "plan": str(output),
    }
    heard: dict[str, Any] = {}
    errors: list[str] = []
    with tempfile.TemporaryDirectory(prefix="monoedge-") as folder, console.phases(output.name) as tell:
        log = Path(folder) / "stderr"
        environment = child_environment() | _library_path(options.target, Path(folder))
        with log.open("wb") as stderr, _child(environment, stderr) as process:
            for event in _events(process, job, plan.model.SerializeToString()):
                if "fraction" in event:
                    tell(event["phase"], event["fraction"])
                elif "error" in event:
                    errors.append(event["error"])
                elif "note" in event:
                    console.say(event["note"])
                else:
                    heard |= event
        printed = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if "done" in heard and process.returncode == 0:
        return FileRecord(heard["size"], heard["sha256"]), heard["done"]
    # A plugin of ours tells most, then TensorRT's first error, then what was printed last.
    ours = [line for line in (*errors, *printed) if f"[{NAMESPACE}]" in line]
    if "failed" in heard:
        reason = f": {ours[0]}" if ours and ours[0] not in heard["failed"] else ""
        raise BackendError(" ".join(f"{plan.graph}: {heard['failed']}{reason}".split()))
    ended = how_it_ended(process.returncode, next(iter([*ours, *errors, *printed[-1:]]), ""))
    raise BackendError(f"{plan.graph}: the process that builds with {options.target.title} {ended}")


def _library_path(target: Target, folder: Path) -> dict[str, str]:
    """Puts the name that the target's parser opens its library by into ``folder``; returns the variable that says so.

    Loading the library first, or setting the variable in a process that runs already, does not help: the name is
    searched again, and the variable is read when a process starts.
    """
    if target.link is None:
        return {}
    name, shipped = target.link
    spec = find_spec(f"{target.module}_libs")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    library = next((Path(place) / shipped for place in places if (Path(place) / shipped).is_file()), None)
    if library is None:  # without the wheel the library is the system's, which has the name
        return {}
    (folder / name).symlink_to(library.resolve())
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))}


@contextmanager
def _child(environment: Mapping[str, str], stderr: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "export.engines.child"], env=environment, stdin=pipe, stdout=pipe, stderr=stderr
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _events(process: subprocess.Popen[bytes], job: Mapping[str, Any], graph: bytes) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None  # noqa: S101 - pipes, as started
    assert process.stdout is not None  # noqa: S101
    # Where it ends early, its exit code and what it printed tell why.
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(job).encode() + b"\n" + graph)
    for line in process.stdout:
        yield json.loads(line)
