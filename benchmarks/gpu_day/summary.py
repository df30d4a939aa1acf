"""What is kept of a GPU day: a record of each step, as JSON and as a page to read, rewritten after each step."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu_day.steps import Step
from runtime.errors import MonoedgeError

PASSED, FAILED, TIMED_OUT, SKIPPED, CUT_OFF = "passed", "failed", "timed out", "skipped", "cut off"
"""Outcomes. A step that the end of a call cut off is tried once more; so is one whose call was killed."""

FINAL = (PASSED, FAILED, TIMED_OUT)
BUILT = "built"
MOST_ARCHIVED = 15 << 20
"""Bytes of the archive of results; beyond, the reports of profiles stay behind, whose text is there."""

TAIL = 20
"""Lines of a failed step's log that the page shows."""


@dataclass
class Record:
    """What became of a step.

    Attributes:
        outcome: one of the above.
        said: the last line of its log, or why it was skipped.
        exit: of its command; None where it did not end by itself.
        seconds: that it ran.
        tries: how often it was begun.
        gpu: the GPU's name.
        sources: the digest of the sources that it ran with.
        command: as run.
    """

    outcome: str
    said: str = ""
    exit: int | None = None
    seconds: float = 0.0
    tries: int = 0
    gpu: str = ""
    sources: str = ""
    command: tuple[str, ...] = ()


class Summary:
    """The records of a results folder, those of earlier calls included.

    Raises:
        MonoedgeError: the folder has a ``summary.json`` that is none of ours.
    """

    def __init__(self, out: Path, steps: Sequence[Step], copy: Path | None = None) -> None:
        self.out, self._steps, self._copy = out, steps, copy
        self._file = out / "summary.json"
        self.records: dict[str, Record] = {}
        if self._file.exists():
            try:
                records = json.loads(self._file.read_text(encoding="utf-8"))["steps"]
                self.records = {name: Record(**record) for name, record in records.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise MonoedgeError(
                    f"{self._file} is no summary of a GPU day: name another folder with --out, or delete it"
                ) from None

    def note(self, name: str, record: Record) -> None:
        """Keeps a record and rewrites all files."""
        self.records[name] = record
        steps = {name: asdict(record) for name, record in self.records.items()}
        _write(self._file, json.dumps({"steps": steps}, indent=2) + "\n")
        _write(self.out / "summary.md", self.page())
        if self._copy is not None:
            self._copy.mkdir(parents=True, exist_ok=True)
            for file in (self._file, self.out / "summary.md"):
                _write(self._copy / file.name, file.read_text(encoding="utf-8"))
            target = self._copy / "results.tar.gz"
            if _archive(self.out, target) > MOST_ARCHIVED:
                _archive(self.out, target, without=(".ncu-rep",))

    def log(self, name: str) -> Path:
        """Where a step's output goes."""
        return self.out / f"{name}.log"

    def page(self) -> str:
        """Markdown: a row a step, the ends of what failed, and the tables that steps printed."""
        lines = ["# GPU day", "", "| step | outcome | seconds | says | proves |", "| --- | --- | ---: | --- | --- |"]
        shown = [step for step in self._steps if step.name in self.records]
        found = {
            kind: sorted({value for record in self.records.values() if (value := getattr(record, kind))})
            for kind in ("gpu", "sources")
        }
        for step in self._steps:
            record = self.records.get(step.name, Record("not begun"))
            # Said of each step only where they are not all of one.
            of = [getattr(record, kind) for kind, values in found.items() if len(values) > 1 and getattr(record, kind)]
            outcome = " of ".join((record.outcome, *of))
            cells = (step.name, outcome, f"{record.seconds:.0f}", record.said.replace("|", "\\|"), step.proves)
            lines.append(f"| {' | '.join(cells)} |")
        for kind, values in found.items():
            lines += ["", f"{kind}: {', '.join(values) or 'unknown'}"]
        for step in shown:
            record, text = self.records[step.name], self._lines(step.name)
            if record.outcome in (FAILED, TIMED_OUT, CUT_OFF):
                lines += ["", f"## {step.name}: {record.outcome}", "", "```text", *text[-TAIL:], "```"]
            elif tables := [line for line in text if line.startswith("|")]:
                lines += ["", f"## {step.name}", "", *tables]
        return "\n".join(lines) + "\n"

    def last_line(self, name: str) -> str:
        """The last line of a step's log, without the rules that tools draw."""
        lines = [text for line in self._lines(name) if (text := line.strip("= \t"))]
        return lines[-1][:200] if lines else ""

    def _lines(self, name: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return []


def _write(file: Path, text: str) -> None:
    """As a whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _archive(folder: Path, target: Path, without: tuple[str, ...] = ()) -> int:
    """All of a results folder but what was compiled, which the next call compiles again; returns the bytes."""
    partial = target.with_name(f".{target.name}.partial")
    with tarfile.open(partial, "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            if file.name != BUILT and not file.name.startswith(".") and file.suffix not in without:
                archive.add(file, file.name)
    partial.replace(target)
    return target.stat().st_size
