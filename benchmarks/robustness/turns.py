"""Asks thousands of questions in one process, and looks at its memory, files and threads meanwhile. Linux only."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import numpy as np

import runtime
from runtime.bench.machine import machine_facts
from runtime.console.run import run
from runtime.errors import MonoedgeError

_DESCRIPTION = """\
Each conversation has ten turns, the first about a picture of its own; a new one begins when it ends. After each tenth
of the turns come the memory that is not a file's, the open files and the threads. They may grow in the first only.

example:
  python benchmarks/robustness/turns.py --bundle bundle/ --turns 10000"""

TURNS = 10
SLACK = 8 << 20
"""Bytes that memory may have grown since the first tenth: what an allocator keeps varies by so much."""


def main() -> None:
    """Reads the command line and asks."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="the bundle that answers")
    parser.add_argument("--turns", type=int, default=10_000, metavar="N", help="questions in all (default 10000)")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        raise MonoedgeError(f"memory is measured with Linux's /proc, this is {sys.platform}")
    print(json.dumps(machine_facts()))
    model, pictures = runtime.load(arguments.bundle), np.random.default_rng(0)
    session, first = model.session(), None
    for number in range(arguments.turns):
        picture = None
        if number % TURNS == 0:
            session = model.session(max_new_tokens=3)
            picture = pictures.integers(0, 256, (64, 64, 3), np.uint8)
        answer = session.ask(f"What is in picture {number}?", picture)
        # Some are read, some left, some cancelled.
        if number % 3 == 0:
            next(iter(answer), None)
        elif number % 3 == 1:
            _ = answer.text
        else:
            session.cancel()
        if (number + 1) % max(1, arguments.turns // 10) == 0:
            gc.collect()
            now = _state()
            print(f"{number + 1} turns: {now[0] >> 20} MiB, {now[1]} files, {now[2]} threads", flush=True)
            first = first or now
            if now[0] > first[0] + SLACK or now[1:] != first[1:]:
                raise MonoedgeError(f"grew since the first tenth: {first} to {now}")


def _state() -> tuple[int, int, int]:
    """Returns bytes of anonymous memory, open files and threads of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    memory = int(lines["RssAnon"].split()[0]) << 10
    return memory, len(list(Path("/proc/self/fd").iterdir())), int(lines["Threads"])


if __name__ == "__main__":
    run(main)
