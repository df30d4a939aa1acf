"""Two bundles compared: the answers of the second along those of the first."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.data import Example, digest
from calibration.reporting.report import Report, comparison_report, stored_size
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
        bundles: folder of the bundle whose answers are followed, and of the other; both may be quantized.
        tests: the questions.
        options: of the questions and the threads; the others mean nothing here.
        console: shown the progress.

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
        comparison, speed = reference.compare(probers[1], advance)
    manifests = [prober.model.bundle.manifest for prober in probers]
    return comparison_report(
        manifests[0],
        manifests[1],
        digest(tests),
        comparison,
        (reference.speed, speed),
        (stored_size(manifests[0]), stored_size(manifests[1])),
        reference.tokenizer,
    )
