"""Times and memory of the way from a checkpoint to an answer, each stage in a process of its own. Linux only."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import cached_part, drop_cached, folder_size, machine_facts, numpy_speed, software_facts

from runtime.bundle import Bundle
from runtime.cli import run
from runtime.errors import MonoedgeError

# Neither torch nor onnxruntime is imported here: a child's peak memory, as the system counts it, is never less than
# what this process had in memory when it started the child.

_DESCRIPTION = """\
Measures an export (seconds, peak memory, size) and sessions on a bundle (load, time to first token, tokens
per second, memory), each in a process of its own, and prints a table. A session asks about one picture of one
tile, then does it again in the same process, with nothing to reuse. Loading includes the import of ONNX Runtime;
the first token of a process, loading the vision graph. The stop token is ignored, so that all runs
generate equally many tokens, random weights included.

examples:
  python benchmarks/make_checkpoint.py /tmp/checkpoint
  python benchmarks/end_to_end.py --ckpt /tmp/checkpoint                     # export, then sessions on the result
  python benchmarks/end_to_end.py --bundle bundle/ --runs 5 --json raw.json  # sessions only

Cold means that the files were dropped from the page cache first; warm, that an earlier run left them there as
far as memory allows ("cached before" says how much). Peak memory counts mapped file pages too; those can be
evicted, anonymous memory cannot. Run it on an idle machine; the table says how idle it was."""

# With the template's system message and one tile this is about 310 tokens, 256 of them visual.
QUESTION = (
    "What is in the picture? Describe what is at the top, what is in the center, and which shape is left of the "
    "red square."
)


def main() -> None:
    """Reads the command line, measures, and prints the table."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = _DESCRIPTION
    parser.add_argument("--ckpt", metavar="CKPT", help="measure the export of this checkpoint (a folder or hub id)")
    parser.add_argument(
        "--bundle", metavar="BUNDLE", type=Path, help="measure sessions on this bundle (default: the exported one)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the export (fp32)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="warm sessions (default 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (the runtime's choice)")
    parser.add_argument(
        "--scratch", type=Path, default=Path(), metavar="DIR", help="where to export to, and to delete it again (.)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers too")
    parser.add_argument("--child", choices=tuple(_CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_CHILDREN[arguments.child](arguments)))
        return
    if not arguments.ckpt and not arguments.bundle:
        parser.error("expected --ckpt or --bundle, or both")
    if arguments.new_tokens < 2 or arguments.runs < 1:
        parser.error("expected --new-tokens of at least 2 and --runs of at least 1")
    if sys.platform != "linux":
        raise MonoedgeError(f"memory is measured with Linux's /proc, this is {sys.platform}")

    for option, folder in (("--scratch", arguments.scratch), ("--json", (arguments.json or Path()).parent)):
        if not folder.is_dir():
            raise MonoedgeError(f"{option}: {folder} is not a folder: make it, or choose another")

    results: dict[str, Any] = {"machine": machine_facts(), "software": software_facts()}
    with tempfile.TemporaryDirectory(prefix=".end-to-end-", dir=arguments.scratch) as scratch:
        bundle: Path | None = arguments.bundle
        if arguments.ckpt:
            exported = Path(scratch) / "bundle"
            results["export"] = _measure_export(arguments.ckpt, exported, arguments.dtype)
            bundle = bundle or (exported if arguments.dtype != "bf16" else None)
        if bundle:
            manifest = Bundle(bundle).manifest
            facts = {"name": manifest.name, "precision": manifest.precision, **asdict(manifest.model)}
            results["bundle"] = {**facts, "bytes": folder_size(bundle)}
            results |= _measure_sessions(arguments, bundle)
    _print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# ---- stages ----------------------------------------------------------------------------------------------


def _measure_export(checkpoint: str, target: Path, dtype: str) -> dict[str, Any]:
    cached = drop_cached(Path(checkpoint)) if Path(checkpoint).is_dir() else None
    command = [sys.executable, "-m", "export.onnx", "--ckpt", checkpoint, "-o", str(target), "--dtype", dtype]
    _, usage = _run(command)
    return {"dtype": dtype, "cached_before": cached, **usage, "bytes": folder_size(target)}


def _measure_sessions(arguments: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    options = ["--new-tokens", str(arguments.new_tokens), "--bundle", str(bundle)]
    if arguments.threads:
        options += ["--threads", str(arguments.threads)]

    def child(name: str) -> dict[str, Any]:
        output, usage = _run([sys.executable, __file__, "--child", name, *options])
        values: dict[str, Any] = json.loads(output.splitlines()[-1])
        return {**values, **usage}

    speed, sessions = child("speed"), []
    for index in range(1 + arguments.runs):
        name = f"warm session {index} of {arguments.runs}" if index else "cold session"
        print(f"{name} …", file=sys.stderr, flush=True)
        cached = cached_part(bundle) if index else drop_cached(bundle)
        sessions.append({"cold": index == 0, "cached_before": cached, **child("session")})
    return {"speed": speed, "threads": arguments.threads, "sessions": sessions}


def _run(command: list[str]) -> tuple[str, dict[str, float]]:
    """Runs a child to its end: what it printed, its seconds and its peak memory, mapped files included."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - ourselves
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise MonoedgeError(f"stopped with exit code {process.returncode}: {' '.join(command)}")
    cpu = usage.ru_utime + usage.ru_stime
    peak = float(usage.ru_maxrss) * 1024
    return output, {"seconds": time.perf_counter() - started, "cpu_seconds": cpu, "peak_bytes": peak}


def _session(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a child: loads a bundle and asks twice, in sessions that share nothing but the model."""
    import numpy as np

    import runtime

    started = time.perf_counter()
    model = runtime.load(arguments.bundle, threads=arguments.threads)
    values: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "answers": []}
    model.stop_ids = frozenset()
    size = model.image_processor.image_size
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    for _ in range(2):
        with model.session(picture, QUESTION, max_new_tokens=arguments.new_tokens, max_tiles=1) as session:
            for _piece in session:
                pass
            values["answers"].append(vars(session.stats))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    for name, key in (("RssAnon", "anonymous_bytes"), ("RssFile", "file_bytes")):
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        values[key] = int(found[1]) * 1024 if found else None
    return values


_CHILDREN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "session": _session,
    "speed": lambda _: numpy_speed(),
}


# ---- table -----------------------------------------------------------------------------------------------


def _print(results: dict[str, Any]) -> None:
    machine, software = results["machine"], results["software"]
    print(
        f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB; load "
        f"average before {machine['load_average_before']:.1f}"
    )
    print("software  " + ", ".join(f"{name} {number}" for name, number in software.items()))
    if export := results.get("export"):
        print(
            f"export    {export['dtype']}, {export['bytes'] / 1e9:.2f} GB written: {export['seconds']:.1f} s, peak "
            f"memory {export['peak_bytes'] / 1e9:.2f} GB"
        )
    if not (sessions := results.get("sessions")):
        print("sessions  none: ONNX Runtime's CPU provider does not run bf16")
        return
    bundle, speed, answer = results["bundle"], results["speed"], sessions[0]["answers"][0]
    print(
        f"bundle    {bundle['name']}: Mono-InternVL {bundle['version']}, {bundle['num_hidden_layers']} layers, hidden "
        f"{bundle['hidden_size']}, {bundle['precision']}, {bundle['bytes'] / 1e9:.2f} GB"
    )
    print(
        f"prompt    {answer['prompt_tokens']} tokens, {answer['visual_tokens']} of them visual; "
        f"{answer['generated_tokens']} generated; threads: {results['threads'] or 'chosen by the runtime'}"
    )
    print(f"numpy     {speed['flops'] / 1e9:.0f} GFLOP/s, {speed['bytes_per_second'] / 1e9:.1f} GB/s just before\n")
    cold, warm = sessions[0], sessions[1:]
    print(f"{'':30}{'cold':>9}{'warm':>9}   min … max of {len(warm)}")
    for title, scale, read in _ROWS:
        values = [read(session) / scale for session in warm]
        middle = statistics.median(values)
        print(f"{title:30}{read(cold) / scale:9.2f}{middle:9.2f}   {min(values):.2f} … {max(values):.2f}")


_ROWS: list[tuple[str, float, Callable[[dict[str, Any]], float]]] = [
    ("cached before, %", 0.01, lambda session: session["cached_before"]),
    ("load, s", 1, lambda session: session["load_seconds"]),
    ("first token, s", 1, lambda session: session["answers"][0]["time_to_first_token"]),
    ("first token, 2nd session, s", 1, lambda session: session["answers"][1]["time_to_first_token"]),
    ("decode, tokens/s", 1, lambda session: session["answers"][0]["tokens_per_second"]),
    ("decode, 2nd session, tokens/s", 1, lambda session: session["answers"][1]["tokens_per_second"]),
    ("peak memory, GB", 1e9, lambda session: session["peak_bytes"]),
    ("anonymous at the end, GB", 1e9, lambda session: session["anonymous_bytes"]),
    ("mapped files at the end, GB", 1e9, lambda session: session["file_bytes"]),
]

if __name__ == "__main__":
    run(main)
