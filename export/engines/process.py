"""The process that builds a plan, seen from outside: started, listened to, ended with us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export.engines.plan import Options, Plan
from runtime.bundle.manifest import FileRecord
from runtime.bundle.targets import Target
from runtime.console.console import Console
from runtime.errors import BackendError

Progress = Callable[[str, float], None]
"""Told the phase and the fraction that is done."""

_OURS = "[monoedge]"
"""What lines of our plugin begin with."""


def build_plan(
    plan: Plan, options: Options, graph: Path, output: Path, progress: Progress, console: Console
) -> tuple[FileRecord, str]:
    """Builds a plan into ``output``; returns its record and the version of TensorRT.

    Args:
        plan: what to build.
        options: what to build with, and for which GPU.
        graph: the original of the plan's graph, which the weights lie beside.
        output: the file to write.
        progress: called now and then.
        console: told what the user should know.

    Raises:
        BackendError: the plan could not be built, with the first of what TensorRT said.
    """
    target = options.target
    job = {
        "module": target.module,
        "title": target.title,
        "plugin": str(options.plugin) if plan.plugins else None,
        "operators": plan.plugins,
        "standard_operators": plan.standard_operators,
        "needs": target.needs,
        "graph": str(graph.absolute()),
        "capability": f"SM{options.capability}" if target.capabilities else None,
        "profiles": [
            {name: list(asdict(shapes).values()) for name, shapes in profile.items()} for profile in plan.profiles
        ],
        "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
        "plan": str(output),
    }
    heard: dict[str, Any] = {}
    errors: list[str] = []
    with tempfile.TemporaryDirectory(prefix="monoedge-") as folder:
        words = Path(folder) / "stderr"
        with words.open("wb") as stderr, _child(_environment(target, Path(folder)), stderr) as process:
            for event in _events(process, job, plan.model.SerializeToString()):
                if "fraction" in event:
                    progress(event["phase"], event["fraction"])
                elif "error" in event:
                    errors.append(event["error"])
                elif "note" in event:
                    console.say(event["note"])
                else:
                    heard |= event
        said = words.read_text(errors="replace").splitlines()
    if "done" in heard and process.returncode == 0:
        return FileRecord(heard["size"], heard["sha256"]), heard["done"]
    raise BackendError(
        _told(
            plan.graph, target.title, heard.get("failed"), heard.get("reported", True), process.returncode, errors, said
        )
    )


def _environment(target: Target, folder: Path) -> dict[str, str]:
    """The child's environment: our packages where they are, and the name that the target's parser asks for.

    Loading the library first, or setting the variable in a process that runs already, does not help: the name is
    searched again, and the variable is read when a process starts.
    """
    environment = dict(os.environ)
    ours = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, environment.get("PYTHONPATH")]))
    if target.link is not None:
        name, shipped = target.link
        spec = find_spec(f"{target.module}_libs")
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        library = next((Path(place) / shipped for place in places if (Path(place) / shipped).is_file()), None)
        # Without the wheel the library is the system's, which has the name.
        if library is not None:
            (folder / name).symlink_to(library.resolve())
            search = [str(folder), environment.get("LD_LIBRARY_PATH")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, search))
    return environment


@contextmanager
def _child(environment: Mapping[str, str], stderr: Any) -> Iterator[subprocess.Popen[bytes]]:  # noqa: ANN401 - a file
    process = subprocess.Popen(
        [sys.executable, "-m", "export.engines.child"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


def _events(process: subprocess.Popen[bytes], job: Mapping[str, Any], graph: bytes) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None  # noqa: S101 - pipes, as started
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(json.dumps(job).encode() + b"\n" + graph)
        process.stdin.close()
    except BrokenPipeError:
        # It ended early; its exit code and last words tell why.
        pass
    for line in process.stdout:
        yield json.loads(line)


def _told(
    graph: str, title: str, failed: str | None, reported: bool, code: int, errors: list[str], said: list[str]
) -> str:
    """One line of all that was said.

    Our plugin's words come first. Unless ``failed`` says it all, TensorRT's first error follows, or last words.
    """
    ours = [line for line in (*errors, *said) if _OURS in line]
    last = [line for line in said if line.strip()][-1:]
    if failed is None:
        ended = f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        failed = f"the process that builds {ended}"
    words = [*ours, *(errors + last if reported else []), ""][0]
    return " ".join(f"{title}, {graph}: {failed}{': ' if words else ''}{words}".split())
