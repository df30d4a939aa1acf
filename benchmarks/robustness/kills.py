"""Kills commands that write bundles at random moments, and looks at what stands there afterwards."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import runtime
from runtime.bench.machine import machine_facts
from runtime.console.run import run
from runtime.errors import MonoedgeError

_DESCRIPTION = """\
Runs each command to its end once, then again and again, each killed after a random part of that time. After each kill
the bundle is either not there or opens with verify=True and answers as before. At the end the command runs once more,
after which nothing is left that was not there the first time.

examples:
  python benchmarks/robustness/kills.py --ckpt checkpoint/ --data pairs.jsonl
  python benchmarks/robustness/kills.py --ckpt checkpoint/ --data pairs.jsonl --engine "--target trt-rtx --sm 120"
"""

BUNDLE = "{folder}/bundle"
"""The bundle that a command writes, in a folder of its own."""
QUESTION = "How many shapes are there?"


@dataclass(frozen=True)
class Command:
    """What is killed.

    Attributes:
        name: for the report.
        arguments: of Python; they write ``BUNDLE``.
        base: the bundle that stands there before, if one does.
    """

    name: str
    arguments: Sequence[str]
    base: Path | None = None


def main() -> None:
    """Reads the command line and kills."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="the folder of a checkpoint")
    parser.add_argument("--data", required=True, help="questions to calibrate with")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="of each command (default 50)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments (default 1)")
    parser.add_argument(
        "--engine", metavar="OPTIONS", help="also python -m export.engine, with these options as one word"
    )
    parser.add_argument("--only", metavar="NAME", help="one of the commands: export, engine …")
    arguments = parser.parse_args()
    print(json.dumps(machine_facts()))
    few = ("--samples", "2", "--test-samples", "2", "--max-new-tokens", "4")
    with tempfile.TemporaryDirectory() as folder:
        base, half = Path(folder) / "base", Path(folder) / "half"
        export = ("-m", "export.onnx", "--ckpt", arguments.ckpt, "-o")
        _run([*export, str(base)])
        calibrate = ("-m", "calibration", "--bundle", str(base), "--data", arguments.data, "-o", BUNDLE, *few)
        record = ("-m", "export.recording", "--bundle", BUNDLE, "--overwrite")
        commands = [
            Command("export", (*export, BUNDLE)),
            Command("export --overwrite", (*export, BUNDLE, "--overwrite"), base),
            Command("calibration", (*calibrate, "--overwrite"), base),
            Command("recording", record, base),
        ]
        if arguments.engine is not None:
            _run([*export, str(half), "--dtype", "fp16"])  # TensorRT wants 16 bits, and a CPU has to answer
            options = shlex.split(arguments.engine)
            commands.append(Command("engine", ("-m", "export.engine", "--bundle", BUNDLE, *options), half))
        faults = [
            fault
            for command in commands
            if arguments.only in (None, command.name)
            for fault in _kill(command, Path(folder) / "work", arguments.kills, random.Random(arguments.seed))  # noqa: S311
        ]
    if faults:
        raise MonoedgeError(f"{len(faults)} faults: {'; '.join(faults)}")


def _kill(command: Command, folder: Path, kills: int, source: random.Random) -> list[str]:
    """Runs and kills one command; returns what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    null = subprocess.DEVNULL
    bundle, faults, killed = Path(BUNDLE.format(folder=folder)), list[str](), 0
    if command.base is not None:
        shutil.copytree(command.base, bundle)
    words = [word.format(folder=folder) for word in command.arguments]
    started = time.perf_counter()
    _run(words)
    took = time.perf_counter() - started
    before, answer = _names(folder), _answer(bundle)
    for number in range(kills):
        if command.base is None:
            shutil.rmtree(bundle, ignore_errors=True)
        with subprocess.Popen([sys.executable, *words], stdout=null, stderr=null) as process:  # noqa: S603
            try:
                process.wait(source.uniform(0, took))
            except subprocess.TimeoutExpired:
                process.kill()
            killed += process.wait() == -signal.SIGKILL
        if (command.base is not None or bundle.exists()) and (wrong := _wrong(bundle, answer)):
            faults.append(f"{command.name}, kill {number}: {wrong}")
    if command.base is None:
        shutil.rmtree(bundle, ignore_errors=True)
    _run(words)
    if left := sorted(_names(folder) - before):
        faults.append(f"{command.name}: left behind {', '.join(left)}")
    print(f"{command.name}: {kills} runs, {killed} killed within {took:.1f} s, {len(faults)} faults", flush=True)
    return faults


def _run(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise MonoedgeError(f"{' '.join(arguments)} failed: {done.stderr.strip()[-300:]}")


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _answer(bundle: Path) -> str:
    return runtime.load(bundle, verify=True).session(prompt=QUESTION, max_new_tokens=8).text


def _wrong(bundle: Path, answer: str) -> str | None:
    try:
        found = _answer(bundle)
    except MonoedgeError as error:
        return str(error)
    return None if found == answer else f"answered {found!r}, expected {answer!r}"


if __name__ == "__main__":
    run(main)
