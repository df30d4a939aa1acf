"""Runs steps one after the other: each bounded in time, all that is not done yet, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic

from benchmarks.gpu_day.steps import Step
from benchmarks.gpu_day.summary import CUT_OFF, FAILED, FINAL, PASSED, SKIPPED, TIMED_OUT, Record, Summary
from runtime.backends.cuda.driver import find_device

ROOT = Path(__file__).resolve().parents[2]
TRIES = 2
"""How often a step is begun that the end of a call, or its death, cuts off."""

LEAST = 3
"""A step is begun only where the budget has a third of its limit left, or of its own; later ones may fit."""

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_FOUND = 127
"""The exit code that shells have for a command that cannot be started."""

LAST_WAIT = 10
"""Seconds that a killed process may take to go: one that hangs in the driver never does."""


def gpu_name() -> str | None:
    """The GPU as ``nvidia-smi`` or the driver names it; None where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60)  # noqa: S607
        name = result.stdout.partition("\n")[0].split(" (UUID")[0].partition(": ")[2]
        if name:
            return name
    device = find_device()
    return device and device.name


class Day:
    """One call of the command.

    Args:
        steps: in order.
        summary: of this call and those before.
        budget: seconds of this call.
        gpu: name of the GPU, or None.
        sources: the digest of what runs.
    """

    def __init__(self, steps: Sequence[Step], summary: Summary, budget: float, gpu: str | None, sources: str) -> None:
        self._steps, self._summary, self._budget = steps, summary, budget
        self._gpu, self._sources = gpu, sources

    def is_done(self, step: Step) -> bool:
        """Whether a step has a result that stands.

        What is compiled has to be there still, of these sources and for this GPU. A failure of other sources may be
        mended; what other sources passed stands.
        """
        record = self._summary.records.get(step.name)
        if step.always or record is None or record.outcome not in FINAL:
            return False
        is_of_these = record.sources == self._sources
        if step.makes and record.outcome == PASSED:
            return is_of_these and record.gpu == (self._gpu or "") and all(file.exists() for file in step.makes)
        return is_of_these or record.outcome == PASSED

    def missing(self, step: Step) -> str | None:
        """Why a step cannot run here."""
        lacking = [f"no {program}" for program in step.programs if shutil.which(program) is None]
        lacking += [f"no {package}" for package in step.packages if importlib.util.find_spec(package) is None]
        lacking += [f"no {file.name}" for file in step.files if not file.exists()]
        if step.gpu and self._gpu is None:
            lacking.insert(0, "no GPU")
        if not lacking:
            return None
        return ", ".join(lacking) + (f"; see {step.instead}" if step.instead else "")

    def run(self, again: Collection[str] = ()) -> Iterator[tuple[Step, Record]]:
        """Runs what is not done, and gives each step with its record as it ends.

        Args:
            again: names of steps that run although they are done.
        """
        end = monotonic() + self._budget
        for step in self._steps:
            if self.is_done(step) and step.name not in again:
                continue
            if reason := self.missing(step):
                record = Record(SKIPPED, reason)
                self._summary.note(step.name, record)
            elif end - monotonic() < min(step.limit, self._budget) / LEAST:
                continue
            else:
                record = self._run(step, end - monotonic())
            yield step, record

    def _run(self, step: Step, rest: float) -> Record:
        before = self._summary.records.get(step.name)
        tries = before.tries if before is not None and before.outcome == CUT_OFF else 0
        record = Record(
            CUT_OFF,
            "the call was killed",
            tries=tries + 1,
            gpu=self._gpu or "",
            sources=self._sources,
            command=step.command,
        )
        # Should this process be killed too, the step counts as cut off.
        self._summary.note(step.name, record)
        began = monotonic()
        code = _bounded(step.command, self._summary.log(step.name), min(step.limit, rest))
        said = self._summary.last_line(step.name)
        if code is None:
            final = rest >= step.limit or record.tries >= TRIES
            outcome = TIMED_OUT if final else CUT_OFF
        elif code == 0:
            outcome = PASSED if step.shown_by in said else SKIPPED
        else:
            outcome = FAILED
        record = replace(record, outcome=outcome, exit=code, seconds=monotonic() - began, said=said)
        self._summary.note(step.name, record)
        return record


def _bounded(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Runs a command in the checkout, its output in a log; returns its exit code, or None if it had to be killed."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = None
    with log.open("wb") as output:
        try:
            with _later(ENDINGS) as mask:
                process = subprocess.Popen(  # noqa: S603 - our own words
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its children end with it
                    preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask),
                )
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        except OSError as error:
            output.write(f"{error.filename}: {error.strerror}\n".encode())
            return NOT_FOUND
        finally:
            # Also what a command that ended by itself left behind.
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_WAIT)


@contextlib.contextmanager
def _later(signals: Collection[signal.Signals]) -> Iterator[Collection[signal.Signals]]:
    """Lets signals wait until the end, so that no process starts that nobody knows of; gives the mask before."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
