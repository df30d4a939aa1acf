"""Profiles the kernels of a layer with Nsight Compute, those furthest from their bound first.

    python -m benchmarks.gpu_day.ncu PROGRAM OUT

``PROGRAM`` is ``benchmarks/kernels.cu``, compiled. A report and its text go to ``OUT`` for each case. Clocks are left
alone. Where ``OUT`` has times of ``fused_moe.py``, they give the order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from pathlib import Path

from runtime.console.run import run
from runtime.errors import MonoedgeError

CASES = (("bf16", 1), ("w8a16", 1), ("bf16", 2900), ("w8a8", 2900), ("w8a8", 1), ("w8a16", 2900))
"""Format of the text expert, and rows."""

TIMES = ("decode.json", "prefill.json")
KERNELS = "regex:^(decode|prefill)Kernel"
OF_A_LAYER = 2
"""Such kernels: gate and up, then down."""

WARM = 2
"""Layers that run before the one that is profiled."""


def by_distance(folder: Path) -> list[tuple[str, int]]:
    """The cases, those first whose time is the largest multiple of their bound; those without a time stay behind."""
    distances: dict[tuple[str, int], float] = {}
    for name in TIMES:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for case in json.loads((folder / name).read_text(encoding="utf-8"))["cases"]:
                for text, times in case["ours"].items():
                    distances[text, case["rows"]] = times["median"] / case["bound"][text]
    return sorted(CASES, key=lambda case: -distances.get(case, 0.0))


def profile(program: Path, text: str, rows: int, report: Path) -> None:
    """Writes ``report`` and its text beside it.

    Raises:
        MonoedgeError: ncu failed; what it says is above.
    """
    command = ["ncu", "--set", "full", "--import-source", "yes", "--clock-control", "none", "--kernel-name", KERNELS]
    command += ["--launch-skip", str(WARM * OF_A_LAYER), "--launch-count", str(OF_A_LAYER), "--force-overwrite"]
    command += ["--export", str(report), str(program), text, str(rows)]
    made = subprocess.run(command, check=False)  # noqa: S603 - our own words
    if made.returncode or not report.is_file():
        raise MonoedgeError(f"ncu made no report of {text} with {rows} rows, exit code {made.returncode}")
    told = ["ncu", "--import", str(report), "--page", "details"]
    with report.with_suffix(".txt").open("wb") as file:
        subprocess.run(told, stdout=file, stderr=subprocess.STDOUT, check=False)  # noqa: S603


def main() -> None:
    """Reads the command line and profiles; a case that fails ends it, since the others would too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("folder", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    cases = by_distance(arguments.folder)
    for text, rows in cases:
        profile(arguments.program, text, rows, arguments.folder / f"ncu-{text}-{rows}.ncu-rep")
        print(f"{text} with {rows} rows: done", flush=True)
    print(f"{len(cases)} reports; the first is of {cases[0][0]} with {cases[0][1]} rows")


if __name__ == "__main__":
    run(main)
