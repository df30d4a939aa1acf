"""How far the answers of one bundle are from those of another."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.data import Example
from calibration.reporting.report import Report, comparison_report
from calibration.trial.measure import Reference
from calibration.trial.prober import Prober, check_examples
from runtime.console.console import Console
from runtime.model import load

if TYPE_CHECKING:
    from calibration.calibrate import Options


def compare(
    bundles: tuple[Path, Path],
    tests: Sequence[Example],
    options: Options,
    console: Console,
) -> Report:
    """Measures how far the answers of a bundle are from those of another.

    Args:
        bundles: the folder of the bundle that answers, and that of the other. Both may be quantized.
        tests: the questions.
        options: ``max_tiles``, ``max_new_tokens`` and ``threads`` are used.
        console: shows the progress.

    Raises:
        CalibrationError: a question cannot be read, or the bundles are of different models.
        BundleError, BackendError: a bundle cannot be used.
    """
    probers = [
        Prober(load(folder, threads=options.threads), options.max_tiles, options.max_new_tokens) for folder in bundles
    ]
    with console.bar("reading", len(tests)) as advance:
        check_examples(probers[0], tests, advance)
    with console.bar("answers before", len(tests)) as advance:
        reference = Reference(probers[0], tests, advance, Path(tempfile.gettempdir()))
    with console.bar("answers after", len(tests)) as advance:
        comparison = reference.compare(probers[1], advance)
    before, after = (prober.model.bundle.manifest for prober in probers)
    return comparison_report(before, after, comparison)
