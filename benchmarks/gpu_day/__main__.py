"""``python benchmarks/gpu_day``: runs what is not done of the GPU day, within a budget of time."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The folder itself stands there, and its names are not for others.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.gpu_day import carry  # noqa: E402
from benchmarks.gpu_day.day import Day, gpu_name  # noqa: E402
from benchmarks.gpu_day.steps import Step, steps  # noqa: E402
from benchmarks.gpu_day.summary import CUT_OFF, FAILED, TIMED_OUT, Summary  # noqa: E402
from runtime.console.run import run  # noqa: E402
from runtime.errors import OptionError  # noqa: E402

_DESCRIPTION = """\
Everything that only a GPU can show, in order of worth: kernels and plugin against float64, tools that watch memory and
races, the device layer, times of layers beside PyTorch and the bounds, and what bounds the slowest kernels. It needs no
network, no .git and no environment of ours; steps that lack something are skipped, with what they lack.

Each step has its own limit and is killed with its children at it; the next one goes on. The results folder has a log
of each step, and summary.json and summary.md, rewritten after each step. The same command again does what is left.

examples:
  python benchmarks/gpu_day --list
  python benchmarks/gpu_day --pack gpu_day.tar.gz       # what to carry to a machine that has no checkout
  python benchmarks/gpu_day --out results --budget 9    # and again, where one call may last ten minutes
  python benchmarks/gpu_day --out results --only decode prefill --again"""

CUDA = "/usr/local/cuda/bin"
"""Where CUDA installs itself; not always on the PATH."""


def main() -> None:
    """Reads the command line and runs the day; exits with 1 if a step failed."""
    parser = argparse.ArgumentParser(
        "python benchmarks/gpu_day", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/gpu_day"), metavar="DIR", help="results (default: %(default)s)")
    add("--copy", type=Path, metavar="DIR", help="also keep both summaries and one archive of all results here")
    add("--budget", type=float, default=25, metavar="MIN", help="minutes of this call (default 25)")
    add("--only", nargs="+", default=[], metavar="STEP", help="these steps and no others")
    add("--skip", nargs="+", default=[], metavar="STEP", help="not these steps")
    add("--again", action="store_true", help="steps of --only run although they are done")
    add("--arch", metavar="NN", help="GPU to compile for, as 90 for 9.0 (default: the one at hand)")
    add("--list", action="store_true", help="show the steps, what each lacks here, and the size to carry")
    add("--pack", type=Path, metavar="FILE", help="write what a machine needs as a .tar.gz, and end")
    arguments = parser.parse_args()
    if arguments.pack:
        print(f"{arguments.pack}: {carry.pack(arguments.pack) / 1e6:.1f} MB, {carry.size() / 1e6:.1f} MB unpacked")
        return
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), CUDA))
    out: Path = arguments.out.absolute()
    everything = steps(out, arguments.arch, carry.find_headers())
    chosen = _choose(everything, arguments.only, arguments.skip)
    if arguments.again and not arguments.only:
        raise OptionError("--again runs steps once more that --only names")
    if not 0 < arguments.budget <= 24 * 60:
        raise OptionError(f"--budget {arguments.budget}: expected minutes, more than 0 and at most a day")
    size, gpu = carry.size(), gpu_name()
    if arguments.list:
        _list(Day(chosen, Summary(out, everything), 0, gpu, ""), chosen)
        print(f"to carry: {size / 1e6:.1f} MB")
        return
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary(out, everything, arguments.copy and arguments.copy.absolute())
    day = Day(chosen, summary, 60 * arguments.budget, gpu, carry.digest())
    print(f"{gpu or 'no GPU'}; {size / 1e6:.1f} MB of the checkout are needed; results in {out}", flush=True)
    for step, record in day.run(again=arguments.only if arguments.again else ()):
        print(f"{step.name}: {record.outcome}, {record.seconds:.0f} s: {record.said}", flush=True)
    left = [step.name for step in chosen if summary.records.get(step.name, None) is None]
    left += [name for name, record in summary.records.items() if record.outcome == CUT_OFF]
    if left:
        print(f"left for the same command again: {', '.join(left)}")
    failed = [step.name for step in chosen if _outcome(summary, step) in (FAILED, TIMED_OUT)]
    if failed:
        print(f"not as they should be: {', '.join(failed)}; see {out / 'summary.md'}")
        sys.exit(1)


def _outcome(summary: Summary, step: Step) -> str | None:
    record = summary.records.get(step.name)
    return record and record.outcome


def _choose(everything: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """The steps that are wanted, in their order."""
    names = [step.name for step in everything]
    for name in (*only, *skip):
        if name not in names:
            raise OptionError(f"there is no step {name}: expected some of {', '.join(names)}")
    return [step for step in everything if step.name not in skip and (not only or step.name in only)]


def _list(day: Day, chosen: Sequence[Step]) -> None:
    for step in chosen:
        state = (
            "done" if day.is_done(step) else f"skipped here: {missing}" if (missing := day.missing(step)) else "to do"
        )
        print(f"{step.name:14} {step.limit:4} s  {step.proves}\n{'':21} {state}")


if __name__ == "__main__":
    run(main)
