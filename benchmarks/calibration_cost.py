"""Time and memory of a calibration, in a process of its own. Linux only."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from runtime.bench.machine import machine_facts
from runtime.bundle.reader import size_text
from runtime.console.run import run
from runtime.errors import MonoedgeError

_DESCRIPTION = """\
Runs python -m calibration with the options given, and says how long it took and what memory: the most at one time
that cannot be evicted, and with it the pages of mapped files, which can. Then sizes and speeds from its report.

example:
  python benchmarks/calibration_cost.py --bundle bundle/ --data pairs.jsonl -o bundle-int8/ --samples 8

How fast the two bundles answer, without what measuring adds:
  python -m runtime.bench --bundle bundle/ --compare bundle-int8/"""

POLL_SECONDS = 0.1


def main() -> None:
    """Reads the command line, runs the calibration and prints what it took."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="the bundle to calibrate")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the bundle to make")
    arguments, rest = parser.parse_known_args()
    if sys.platform != "linux":
        raise MonoedgeError(f"memory is measured with Linux's /proc, this is {sys.platform}")
    print(json.dumps(machine_facts()))
    command = ["-m", "calibration", "--bundle", str(arguments.bundle), "-o", str(arguments.output), *rest]
    started = time.perf_counter()
    anonymous = total = 0
    with subprocess.Popen([sys.executable, *command]) as process:  # noqa: S603 - ourselves
        while process.poll() is None:
            now = _memory(process.pid)
            anonymous, total = max(anonymous, now["RssAnon"]), max(total, now["VmRSS"])
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise MonoedgeError(f"stopped with exit code {process.returncode}: {' '.join(command)}")
    report = json.loads((arguments.output / "calibration.json").read_text(encoding="utf-8"))
    sizes = [size_text(_size(folder)) for folder in (arguments.bundle, arguments.output)]
    print(f"{report['observed']['examples']} examples observed, {time.perf_counter() - started:.0f} s in all")
    print(f"memory: {size_text(anonymous)} that cannot be evicted, {size_text(total)} with mapped files")
    print(f"bundle: {sizes[0]} → {sizes[1]}")


def _memory(process: int) -> dict[str, int]:
    """What a process holds in memory, in bytes; zeros once it has ended."""
    found = {"RssAnon": 0, "VmRSS": 0}
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return found
    for line in lines:
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


if __name__ == "__main__":
    run(main)
