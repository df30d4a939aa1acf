"""A whole calibration: observe, choose scales, fit the budget, write the bundle and its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration import CalibrationError
from calibration.data import Example, Questions, digest
from calibration.observed.observe import observe
from calibration.observed.record import Origin, Record, bundle_hash
from calibration.reporting.page import page
from calibration.reporting.report import Report, calibration_report
from calibration.scales.choose import Choice, choose
from calibration.trial.budget import Trials, fit_budget, layer_name
from calibration.trial.measure import Reference
from calibration.trial.prober import Prober, check_examples
from export.external_data import weights_size
from export.quantized.bundle import check_source, require_room, write_quantized
from export.quantized.quantizable import Matrix, choose_matrices, find_matrices
from export.quantized.rewrite import decoder_files
from export.quantized.weights import DecoderWeights
from export.writer import BundleWriter
from runtime.bundle.manifest import CPU, QDQ, TOKENIZER
from runtime.bundle.reader import Bundle
from runtime.console.console import Console
from runtime.console.files import require_output
from runtime.model import load
from runtime.records import find

REPORT_JSON, REPORT_HTML = "calibration.json", "calibration.html"
"""The files of the report in a bundle."""


@dataclass(frozen=True, kw_only=True)
class Options(Choice):
    """What is quantized, how, and what it may cost.

    Attributes:
        experts: ``text``, or ``text`` and ``visual``.
        attention, lm_head, kv_cache: whether these are quantized too.
        form: ``qdq`` or ``cpu``; None for what fits the bundle that is quantized.
        seed: of all random choices.
        max_tiles: the most tiles of a picture; None for the checkpoint's limit.
        max_new_tokens: the most tokens of an answer.
        max_kl: the budget of the mean KL divergence, in nats; None for no budget.
        threads: CPU threads to compute with; None for ONNX Runtime's choice.
    """

    experts: tuple[str, ...]
    attention: bool
    lm_head: bool
    kv_cache: bool
    form: str | None
    seed: int
    max_tiles: int | None
    max_new_tokens: int
    max_kl: float | None
    threads: int | None

    def form_for(self, bundle: Bundle) -> str:
        """Returns the form of a bundle: ``cpu`` where ONNX Runtime's INT8 kernels can take it, else ``qdq``."""
        return self.form or (CPU if bundle.manifest.precision == "fp32" and self.mode == "w8a16" else QDQ)

    def settings(self, form: str) -> dict[str, Any]:
        """Returns the options as the report lists them."""
        names = ("mode", "form", "experts", "attention", "lm_head", "kv_cache", "weights", "activations", "smoothing")
        values = {name: getattr(self, name) for name in (*names, "max_kl", "seed")}
        return values | {"form": form, "activations": self.method}


def calibrate(
    bundle: Bundle,
    questions: Questions,
    options: Options,
    output: Path,
    file: Path,
    *,
    overwrite: bool,
    apply_to: Bundle | None,
    console: Console,
) -> Report:
    """Makes a quantized bundle.

    Args:
        bundle: not quantized, fp32 or fp16. It is observed, and answers are compared with its own.
        questions: to observe, and to measure with.
        options: what is quantized, and how.
        output: the folder of the quantized bundle, with the report in it.
        file: keeps the observations. A complete one is used again, an incomplete one is completed.
        overwrite: whether a bundle that exists is replaced.
        apply_to: the same model in another number format, which is quantized instead; None for ``bundle`` itself.
        console: shows each step and the progress.

    Raises:
        CalibrationError: something does not fit, or the budget cannot be held. No bundle was written then.
        BundleError: the bundle cannot be written.
        OptionError: the observations cannot be written.
        BackendError: ONNX Runtime cannot run the bundle.
    """
    source = apply_to or bundle
    form = options.form_for(source)
    BundleWriter(output, overwrite)  # refuses a target that exists before any work
    check_source(bundle.manifest, options.mode, form=QDQ)
    check_source(source.manifest, options.mode, form, options.kv_cache)
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalibrationError(f"{folder} cannot be made: {error.strerror}") from None
    require_output(file, "--record")
    weights = source_weights = DecoderWeights(bundle)
    matrices = choose_matrices(find_matrices(weights.model), options.experts, options.attention, options.lm_head)
    if apply_to is not None:
        source_weights = DecoderWeights(apply_to)
        _require_same(weights, source_weights, matrices)
    require_room(source, output, matrices)

    prober = Prober(load(bundle.folder, threads=options.threads), options.max_tiles, options.max_new_tokens)
    check_examples(prober, [*questions.observed, *questions.tests], console)
    record = _observe(weights, matrices, questions.observed, options, file, console)
    started = time.perf_counter()
    with console.bar("scales", len(matrices)) as advance:
        chosen = choose(weights, matrices, record, options, advance, options.kv_cache)
    console.say(f"chose the scales of {len(matrices)} matrices in {time.perf_counter() - started:.0f} s")

    console.say(f"measuring with {len(questions.tests)} other questions")
    with console.bar("answers before", len(questions.tests)) as advance:
        reference = Reference(prober, questions.tests, advance, folder)
    trials = Trials(weights, reference, form, options.threads, console)
    trial = trials.run(chosen.plan, "answers after")
    if options.max_kl is not None:
        trial = fit_budget(trials, trial, options.max_kl)
        if trial.kept:
            console.say(f"not quantized, to keep within the budget: {', '.join(map(layer_name, trial.kept))}")
    plan = trial.plan
    planned = {matrix.name for matrix in plan.matrices}
    figures = [matrix for matrix in chosen.matrices if matrix.name in planned]
    size = weights_size(decoder_files(source_weights.smoothed(plan.smoothing), plan, form, source.manifest.model))
    report = calibration_report(source.manifest, record, options.settings(form), figures, trial, size)
    files = {REPORT_JSON: report.json().encode(), REPORT_HTML: page(report).encode()}
    write_quantized(source_weights, output, plan, form=form, record=files, overwrite=overwrite, console=console)
    return report


def _observe(
    weights: DecoderWeights,
    matrices: Sequence[Matrix],
    examples: Sequence[Example],
    options: Options,
    file: Path,
    console: Console,
) -> Record:
    """Returns the complete record: read from its file, and what it lacks observed."""
    manifest, names = weights.bundle.manifest, tuple(matrix.name for matrix in matrices)
    limits = options.seed, options.max_tiles, options.max_new_tokens
    origin = Origin(bundle_hash(manifest), manifest.name, digest(examples), len(examples), *limits, names)
    if find(file, CalibrationError) is not None:
        record = Record.load(file)
        record.require(origin, file)
        console.say(f"{file}: {record.done} of {len(examples)} examples have been observed")
    else:
        record = Record.nothing(origin, [matrix.channels for matrix in matrices])
    if not record.complete:
        started, before = time.perf_counter(), record.done
        with console.bar("observing", len(examples)) as advance:
            observe(weights, examples, record, file, advance, options.threads)
        seconds = time.perf_counter() - started
        console.say(f"observed {len(examples) - before} examples in {seconds:.0f} s; the record is {file}")
    return record


def _require_same(weights: DecoderWeights, others: DecoderWeights, matrices: Sequence[Matrix]) -> None:
    """Refuses two bundles that are not of one model, and says what differs; their number formats may."""
    bundle, other = weights.bundle, others.bundle
    advice = "export both from one checkpoint"
    for item in ("model", "image"):
        if getattr(bundle.manifest, item) != getattr(other.manifest, item):
            raise CalibrationError(f"{other.folder} is another model than {bundle.folder} ({item}): {advice}")
    if bundle.manifest.files[TOKENIZER] != other.manifest.files[TOKENIZER]:
        raise CalibrationError(f"{other.folder} has another tokenizer than {bundle.folder}: {advice}")
    for matrix in matrices:
        block, given = next(weights.blocks(matrix.name)), next(others.stored(matrix.name))
        if not np.array_equal(block.astype(given.dtype), given):
            raise CalibrationError(f"{other.folder} has other weights than {bundle.folder} ({matrix.name}): {advice}")
