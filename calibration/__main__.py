"""``python -m calibration``: quantizes the experts of a bundle to INT8, and reports how far its answers moved."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.options import read_options
from runtime.console.console import Console
from runtime.console.files import replaced
from runtime.console.run import need, run

if TYPE_CHECKING:
    from calibration.calibrate import Options
    from calibration.data import Example
    from calibration.reporting.report import Report


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrates, compares or inspects, as the command line says; by default that of this process."""
    arguments = read_options(argv)
    need("onnx", "onnx_ir", "ml_dtypes", "matplotlib", "threadpoolctl")
    if arguments.inspect is not None:
        from calibration.observed.inspect import inspect

        Console().write(inspect(arguments.inspect) + "\n")
    elif arguments.compare is not None:
        _compare(arguments)
    else:
        _calibrate(arguments)


def _calibrate(arguments: argparse.Namespace) -> None:
    from calibration.calibrate import REPORT_HTML, Target, calibrate
    from calibration.data import draw
    from runtime.bundle.reader import Bundle

    examples = _read(arguments.data, arguments)
    given = _read(arguments.test_data, arguments) if arguments.test_data is not None else None
    questions = draw(examples, arguments.samples, arguments.test_samples, arguments.seed, given)
    output: Path = arguments.output
    record = arguments.record or output.parent / f"{output.resolve().name}.observed.npz"
    apply_to = Bundle(arguments.apply_to) if arguments.apply_to is not None else None
    console, target = Console(), Target(output, record, arguments.overwrite)
    report = calibrate(Bundle(arguments.bundle), questions, _options(arguments), target, apply_to, console)
    _write(report, arguments.report, console)
    console.say(
        f'wrote {output}; its report is {output / REPORT_HTML}; try it:\n  python -m runtime.chat --bundle {output} "…"'
    )


def _compare(arguments: argparse.Namespace) -> None:
    from calibration.compare import compare
    from calibration.data import sample

    console = Console()
    tests = sample(_read(arguments.data, arguments), arguments.test_samples, arguments.seed)
    _write(compare(tuple(arguments.compare), tests, _options(arguments), console), arguments.report, console)


def _read(data: Path, arguments: argparse.Namespace) -> list[Example]:
    from calibration.data import read_examples

    return read_examples(data, arguments.prompt if data.is_dir() or arguments.data == data else None)


def _options(arguments: argparse.Namespace) -> Options:
    from calibration.calibrate import Options
    from calibration.scales.choose import Choice

    return Options(
        experts=tuple(arguments.experts.split(",")),
        attention=arguments.attention,
        lm_head=arguments.lm_head,
        kv_cache=arguments.kv_cache,
        choice=Choice(arguments.mode, arguments.weights, arguments.activations, arguments.smoothing),
        form=arguments.form,
        seed=arguments.seed,
        max_tiles=arguments.max_tiles,
        max_new_tokens=arguments.max_new_tokens,
        max_kl=arguments.max_kl,
        threads=arguments.threads,
    )


def _write(report: Report, path: Path | None, console: Console) -> None:
    """Shows the report, and writes its files where ``--report`` is given."""
    from calibration.errors import CalibrationError
    from calibration.reporting.page import page

    console.write(report.text() + "\n")
    if path is None:
        return
    try:
        for ending, text in ((".json", report.json()), (".html", page(report))):
            with replaced(path.with_name(path.name + ending)) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"the report {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    run(main)
