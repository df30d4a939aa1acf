"""What ``python -m calibration`` does, once the packages that this needs are known to be there."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields
from pathlib import Path

from calibration import CalibrationError
from calibration.calibrate import REPORT_HTML, Options, calibrate
from calibration.data import Example, draw, read_examples, sample
from calibration.observed.inspect import inspect
from calibration.reporting.page import page
from calibration.reporting.report import Report, comparison_report
from calibration.trial.measure import Reference
from calibration.trial.prober import Prober, check_examples
from runtime.bundle.engines import next_command
from runtime.bundle.reader import Bundle
from runtime.console.console import Console
from runtime.console.files import replaced, require_output
from runtime.console.table import aligned
from runtime.model import load


def calibrate_bundle(arguments: argparse.Namespace) -> None:
    """Calibrates ``--bundle``, and writes the bundle ``-o``."""
    _require_report(arguments.report)
    examples = _read(arguments.data, arguments)
    given = _read(arguments.test_data, arguments) if arguments.test_data is not None else None
    questions = draw(examples, arguments.samples, arguments.test_samples, arguments.seed, given)
    output: Path = arguments.output
    record = arguments.record or output.parent / f"{output.resolve().name}.observed.npz"
    apply_to = Bundle(arguments.apply_to) if arguments.apply_to is not None else None
    options = Options(**{item.name: getattr(arguments, item.name) for item in fields(Options)})
    console, bundle = Console(), Bundle(arguments.bundle)
    report = calibrate(
        bundle, questions, options, output, record, overwrite=arguments.overwrite, apply_to=apply_to, console=console
    )
    _show(report, arguments.report, console)
    command = next_command(Bundle(output).manifest, output)
    console.say(f"wrote {output}; its report is {output / REPORT_HTML}; try it:\n  {command}")


def compare_bundles(arguments: argparse.Namespace) -> None:
    """Measures how far the answers of the second bundle of ``--compare`` are from those of the first."""
    _require_report(arguments.report)
    console = Console()
    tests = sample(_read(arguments.data, arguments), arguments.test_samples, arguments.seed)
    before, after = (
        Prober(load(folder, threads=arguments.threads), arguments.max_tiles, arguments.max_new_tokens)
        for folder in arguments.compare
    )
    check_examples(before, tests, console)
    with console.bar("answers before", len(tests)) as advance:
        reference = Reference(before, tests, advance, Path(tempfile.gettempdir()))
    with console.bar("answers after", len(tests)) as advance:
        comparison = reference.compare(after, advance)
    report = comparison_report(before.model.bundle.manifest, after.model.bundle.manifest, comparison)
    _show(report, arguments.report, console)


def inspect_record(arguments: argparse.Namespace) -> None:
    """Shows what the file ``--inspect`` holds."""
    Console().write(inspect(arguments.inspect) + "\n")


def _read(data: Path, arguments: argparse.Namespace) -> list[Example]:
    prompt = arguments.prompt if data.is_dir() or arguments.data == data else None
    return read_examples(data, prompt, as_stored=arguments.as_stored)


def _files(report: Path) -> tuple[Path, Path]:
    return Path(f"{report}.json"), Path(f"{report}.html")


def _require_report(report: Path | None) -> None:
    for file in () if report is None else _files(report):
        require_output(file, "--report")


def _show(report: Report, path: Path | None, console: Console) -> None:
    """Shows a report, and writes its files where ``--report`` is given."""
    console.write(aligned(report.table()) + "\n")
    if path is None:
        return
    try:
        for file, text in zip(_files(path), (report.json(), page(report)), strict=True):
            with replaced(file) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"the report {path} cannot be written: {error.strerror}") from None
