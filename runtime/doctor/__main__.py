"""``python -m runtime.doctor``: says of everything that answering needs whether it is here, and what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runtime
from runtime.backends import DEFAULT, NAMES
from runtime.backends.plugin_library import plugin_library
from runtime.console.console import Console
from runtime.console.files import replaced, require_output
from runtime.console.run import make_parser, run
from runtime.doctor import gpu as graphics
from runtime.doctor import host, libraries
from runtime.doctor.children import TrialError, attempt, command
from runtime.doctor.plugin import LIBRARY, plugin
from runtime.doctor.report import ALL, MISSING, OK, TENSORRT, WRONG, Finding, Step, verdict
from runtime.errors import MonoedgeError, OptionError
from runtime.records import user_path

if TYPE_CHECKING:
    from runtime.bundle.reader import Bundle

_DESCRIPTION = """\
Says of everything that answering needs whether it is here: Python, packages, GPU and driver, TensorRT, the plugin
library, disk; with a bundle whether it is whole, whether it fits, whether its engines are for this machine, and which
backends would answer from it. Each line is ok, missing or wrong, and says what to do. Each library is tried in a
process of its own, so that one that crashes is a line.

examples:
  python -m runtime.doctor
  python -m runtime.doctor --bundle bundle/ --backend tensorrt
  python -m runtime.doctor --bundle bundle/ --verify --json facts.json

exit codes: 0 if nothing keeps the backend from answering, 1 if something does, 2 for options that cannot be."""

BUNDLE_VARIABLE = "MONOEDGE_BUNDLE"
"""As ``runtime.loaded`` has it, which needs packages that may be missing."""


def main() -> None:
    """Reads the command line, looks at everything, and writes the report."""
    arguments = _parser().parse_args()
    if arguments.json is not None:
        require_output(arguments.json, "--json")
    if arguments.verify and not arguments.bundle:
        raise OptionError("--verify is about a bundle: name it with --bundle")
    doctor = Doctor(arguments.bundle, arguments.backend, arguments.verify, Console())
    well = doctor.examine()
    if arguments.json is not None:
        _write(arguments.json, doctor.facts())
    sys.exit(0 if well else 1)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("runtime.doctor", _DESCRIPTION, "%(prog)s [--bundle DIR] [options]")
    add = parser.add_argument
    variable = f"(default: the environment variable {BUNDLE_VARIABLE})"
    add("--bundle", default=os.environ.get(BUNDLE_VARIABLE), metavar="DIR", help=f"a bundle to answer from {variable}")
    chosen = f"default: tensorrt for a bundle in bf16 or with engines, or without a bundle on a GPU; else {DEFAULT}"
    add("--backend", choices=NAMES, help=f"what is to compute ({chosen})")
    add("--verify", action="store_true", help="read all of the bundle to compare the SHA-256 of its files")
    add("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    return parser


class Doctor:
    """Looks at this machine step by step.

    Args:
        folder: a bundle's folder, or None.
        backend: what is to compute; None chooses.
        verify: whether the bundle's files are compared with their SHA-256.
        console: what the report is written to.
    """

    def __init__(self, folder: str | None, backend: str | None, verify: bool, console: Console) -> None:
        self._folder, self._verify, self._console = folder, verify, console
        self._steps: list[Step] = []
        self._gpu = self._find_gpu()
        self._bundle = self._open()
        self._versions: dict[str, str] = {}
        self._library: Path | None = None
        self.backend = backend or self._choose()
        self._verdict, self._well = "", False

    def _find_gpu(self) -> graphics.Gpu:
        try:
            return graphics.find_gpu()
        except Exception as error:
            return graphics.Gpu(findings=[_fault("GPU", error)])

    def _open(self) -> Bundle | None:
        """Opens the bundle for what its manifest says; what keeps it from being opened is told by a step."""
        if self._folder is None:
            return None
        try:
            from runtime.bundle.reader import Bundle

            return Bundle(self._folder)
        except Exception:
            return None

    def _choose(self) -> str:
        if self._bundle is None:
            return "tensorrt" if self._gpu.device is not None or self._gpu.jetson else DEFAULT
        manifest = self._bundle.manifest
        return "tensorrt" if manifest.precision == "bf16" or manifest.engines else DEFAULT

    def examine(self) -> bool:
        """Writes the report; returns whether the backend can answer."""
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        of_what = f" from {self._folder}" if self._folder else ""
        self._console.write(
            f"monoedge {runtime.__version__}, {now}: can backend {self.backend} answer{of_what} here?\n"
            "What keeps it from that is marked with !\n"
        )
        self._step("Python", host.python)
        self._step("packages", host.packages)
        self._step("GPU", lambda: [*self._gpu.findings, *graphics.packages(self._gpu)])
        self._step("TensorRT", self._tensorrt)
        self._step("plugin library", self._plugin)
        self._step("disk", lambda: host.disk(user_path(self._folder) if self._folder else None))
        if self._folder is not None:
            self._step("bundle", self._look_at_bundle)
        if self._bundle is not None:
            self._step("backends", self._backends)
        self._step("trials on the GPU", self._trials)
        self._well, self._verdict = verdict(self._steps, self.backend, self._folder)
        self._console.write(f"\n{self._verdict}\n")
        return self._well

    def facts(self) -> dict[str, Any]:
        """Returns what the report says, for JSON."""
        return {
            "monoedge": runtime.__version__,
            "backend": self.backend,
            "bundle": self._folder,
            "steps": [
                {"title": step.title, "findings": [finding.facts(self.backend) for finding in step.findings]}
                for step in self._steps
            ],
            "well": self._well,
            "verdict": self._verdict,
        }

    def _step(self, title: str, look: Callable[[], Iterable[Finding]]) -> None:
        """Takes a step and writes its lines. An error of our own is one of them."""
        findings: list[Finding] = []
        try:
            findings.extend(look())
        except Exception as error:
            findings.append(_fault(title, error))
        self._steps.append(Step(title, findings))
        self._console.write(f"\n{title}\n" + "".join(finding.lines(self.backend) for finding in findings))

    def _tensorrt(self) -> Iterator[Finding]:
        for finding, module, version in libraries.tensorrts(self._gpu):
            if version:
                self._versions[module] = version
            yield finding
        yield from libraries.search_path(self._gpu, self._versions)

    def _plugin(self) -> Iterator[Finding]:
        for finding in plugin(self._gpu, self._versions, self._operators()):
            if finding.what == LIBRARY and finding.status == OK:
                self._library = plugin_library()
            yield finding
        yield libraries.toolkit()

    def _operators(self) -> dict[str, int]:
        """The plugins that the bundle needs; without one all that there are."""
        try:
            from runtime.bundle.manifest import OPERATOR_VERSIONS
        except ImportError:
            return {}
        if self._bundle is not None and not self._bundle.manifest.by_expert:
            return self._bundle.manifest.operators
        return {name: version for name, version in OPERATOR_VERSIONS.items() if not name.endswith("NBits")}

    def _look_at_bundle(self) -> Iterator[Finding]:
        assert self._folder is not None  # noqa: S101 - as examine asks
        try:
            from runtime.doctor import bundle
        except ImportError as error:
            yield Finding("files", MISSING, f"not looked at: {error}", "install the packages above first", ALL)
            return
        finding, opened = bundle.opened(self._folder, self._verify, self._console)
        yield finding
        if opened is not None:
            yield from bundle.fit(opened, self._gpu)
            yield from bundle.engines(opened, self._gpu, self._versions, self._library)

    def _backends(self) -> Iterator[Finding]:
        from runtime.doctor import bundle

        assert self._bundle is not None  # noqa: S101 - as examine asks
        yield from bundle.backends(self._bundle)

    def _trials(self) -> Iterator[Finding]:
        if self._gpu.device is None:
            yield Finding("copies, kernels, engines", MISSING, "there is no GPU to try them on")
            return
        yield _tried("copies", lambda: f"{attempt('bandwidth') / 1e9:.0f} GB/s of the GPU's memory, read and written")
        yield _tried("resizing a picture", lambda: f"{attempt('resize'):,} numbers are those of Pillow")
        yield _tried("kernels", lambda: f"{attempt('kernels'):,} problems of the operators agree with float64")
        yield self._engines(self._gpu.device.capability)

    def _engines(self, capability: int) -> Finding:
        """Compares the engines with what was recorded, by the command that does that."""
        what = "engines"
        if self._bundle is None:
            return Finding(what, MISSING, "no bundle was named", "name one with --bundle")
        from runtime.doctor import bundle

        reason, remedy = bundle.why_untried(self._bundle, capability)
        if reason:
            return Finding(what, MISSING, reason, remedy)
        words = ("--bundle", str(self._bundle.folder), "--check")
        finding = _tried(what, lambda: command("export.engine", *words))
        if finding.found.startswith("not checked"):
            return Finding(what, MISSING, finding.found)
        return finding


def _fault(title: str, error: Exception) -> Finding:
    what = " ".join(f"this step failed, which is a fault of monoedge: {type(error).__name__}: {error}".split())
    return Finding(title, WRONG, what, "report this", ALL)


def _tried(what: str, attempted: Callable[[], str]) -> Finding:
    try:
        return Finding(what, OK, attempted(), needed_by=TENSORRT)
    except TrialError as error:
        return Finding(what, WRONG, str(error), needed_by=TENSORRT)


def _write(file: Path, facts: dict[str, Any]) -> None:
    try:
        with replaced(file) as partial:
            partial.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise MonoedgeError(f"--json: {file} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run(main)
