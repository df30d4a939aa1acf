"""What was found, line by line, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.backends import DEFAULT, NAMES
from runtime.errors import visible

OK, MISSING, WRONG = "ok", "missing", "wrong"

ALL, CPU, TENSORRT = NAMES, (DEFAULT,), ("tensorrt",)
ON_GPU = tuple(name for name in NAMES if name not in CPU)
ON_ONNXRUNTIME = tuple(name for name in NAMES if name.startswith("onnxruntime"))
NOBODY: tuple[str, ...] = ()
"""The backends that something may be needed by. ``NOBODY`` needs, say, the tools that build the plugin library."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: was looked at, in a word or two.
        status: ``OK``, ``MISSING`` or ``WRONG``.
        found: what is there, or what is wrong with it.
        remedy: what to do where the status is not ``OK``; empty where ``found`` says it already.
        needed_by: the backends that cannot answer without it.
    """

    what: str
    status: str
    found: str
    remedy: str = ""
    needed_by: Sequence[str] = NOBODY

    def hinders(self, backend: str) -> bool:
        """Whether the backend cannot answer because of it."""
        return self.status != OK and backend in self.needed_by

    def lines(self, backend: str) -> str:
        """Returns the line, marked where it hinders the backend, and another with the remedy where there is one."""
        mark = "!" if self.hinders(backend) else " "
        text = f"{mark} {self.status:7}  {self.what}: {visible(self.found)}\n"
        return text + (f"           → {visible(self.remedy)}\n" if self.remedy else "")

    def facts(self, backend: str) -> dict[str, Any]:
        """Returns the same for JSON."""
        return {
            "what": self.what,
            "status": self.status,
            "found": visible(self.found),
            "remedy": visible(self.remedy),
            "hinders": self.hinders(backend),
        }


@dataclass(frozen=True)
class Step:
    """A part of the report: its title and its lines."""

    title: str
    findings: Sequence[Finding]


def verdict(steps: Iterable[Step], backend: str, bundle: str | None) -> tuple[bool, str]:
    """Returns whether the backend can answer here, and the line that says so."""
    hindering = [f"{step.title}, {item.what}" for step in steps for item in step.findings if item.hinders(backend)]
    of_what = f" from {bundle}" if bundle else ""
    if not hindering:
        return True, visible(f"verdict: nothing that was found keeps backend {backend} from answering{of_what} here")
    count = f"{len(hindering)} thing{'s' * (len(hindering) > 1)}"
    keeps = f"keep{'s' * (len(hindering) == 1)} backend {backend} from answering{of_what} here"
    return False, visible(f"verdict: {count} {keeps}: {'; '.join(hindering)}")
