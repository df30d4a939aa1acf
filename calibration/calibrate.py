"""The whole way: observe, choose scales, hold the budget, write the bundle and its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from calibration.data import Example, digest
from calibration.errors import CalibrationError
from calibration.observed.observe import observe
from calibration.observed.record import Origin, Record, bundle_hash
from calibration.reporting.page import page
from calibration.reporting.report import Report, calibration_report, stored_size
from calibration.scales.choose import Choice, Chosen, choose
from calibration.trial.budget import Trial, Trials, fit_budget, name
from calibration.trial.candidate import weights_size
from calibration.trial.measure import Reference
from calibration.trial.prober import Prober, check_examples
from export.quantized.bundle import check_source, write_quantized
from export.quantized.quantizable import Matrix, choose_matrices, find_matrices
from export.quantized.weights import DecoderWeights
from export.writer import BundleWriter
from runtime.bundle.manifest import CPU, QDQ, TOKENIZER
from runtime.bundle.reader import Bundle
from runtime.console.console import SILENT, Console
from runtime.model import load

REPORT_JSON, REPORT_HTML = "calibration.json", "calibration.html"
"""Names of the report in a bundle."""


@dataclass(frozen=True)
class Options:
    """What is quantized, how, and what it may cost.

    Attributes:
        experts: ``text``, or ``text`` and ``visual``.
        attention, lm_head, kv_cache: quantize these too.
        choice: how scales are chosen.
        form: ``qdq`` or ``cpu``; None for what fits the bundle that is quantized.
        seed: of what is random.
        max_tiles: most tiles of a picture; None for the checkpoint's limit.
        max_new_tokens: tokens that an answer may have.
        max_kl: budget of the mean KL divergence, in nats; None for none.
        threads: to compute with; None for ONNX Runtime's choice.
    """

    experts: tuple[str, ...] = ("text",)
    attention: bool = False
    lm_head: bool = False
    kv_cache: bool = False
    choice: Choice = field(default_factory=Choice)
    form: str | None = None
    seed: int = 0
    max_tiles: int | None = None
    max_new_tokens: int = 64
    max_kl: float | None = None
    threads: int | None = None

    def form_for(self, bundle: Bundle) -> str:
        """``cpu`` where ONNX Runtime's kernels can take it, else ``qdq``."""
        if self.form is not None:
            return self.form
        return CPU if bundle.manifest.precision == "fp32" and self.choice.mode == "w8a16" else QDQ


def calibrate(
    bundle: Bundle,
    examples: Sequence[Example],
    tests: Sequence[Example],
    options: Options,
    output: Path,
    record_file: Path,
    *,
    apply_to: Bundle | None = None,
    overwrite: bool = False,
    console: Console = SILENT,
) -> Report:
    """Makes a quantized bundle.

    Args:
        bundle: not quantized, fp32 or fp16; it is observed and answers are compared with its own.
        examples: to observe.
        tests: to measure with.
        options: what to do.
        output: the bundle to make, with the report in it.
        record_file: where observations are kept; a run that was interrupted goes on from it, and one that is
            complete is used again.
        apply_to: the same model in another number format, to be quantized instead.
        overwrite: replace a bundle that is there.
        console: told each step, and the progress.

    Raises:
        CalibrationError: something does not fit, or the budget does not hold; nothing was written then.
        BundleError: the bundle cannot be written.
        BackendError: ONNX Runtime cannot run the bundle.
    """
    source = apply_to or bundle
    form = options.form_for(source)
    BundleWriter(output, overwrite)  # refuses a target that exists before any work
    check_source(bundle.manifest, options.choice.mode, form=QDQ)
    check_source(source.manifest, options.choice.mode, form, options.kv_cache)
    try:
        record_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalibrationError(f"{record_file.parent} cannot be made: {error.strerror}") from None
    graph = DecoderWeights(bundle).model
    matrices = choose_matrices(find_matrices(graph), options.experts, options.attention, options.lm_head)
    if apply_to is not None:
        require_same(bundle, apply_to, matrices)

    model = load(bundle.folder, threads=options.threads)
    prober = Prober(model, options.max_tiles, options.max_new_tokens)
    with console.bar("reading", len(examples) + len(tests)) as advance:
        check_examples(prober, [*examples, *tests], advance)
    record = _observe(bundle, graph, matrices, examples, options, record_file, console)
    started = time.perf_counter()
    with console.bar("scales", len(matrices)) as advance:
        chosen = choose(bundle, matrices, record, options.choice, advance, options.kv_cache)
    console.say(f"chose the scales of {len(matrices)} matrices in {time.perf_counter() - started:.0f} s")

    console.say(f"measuring with {len(tests)} other questions")
    with console.bar("answers before", len(tests)) as advance:
        reference = Reference(prober, tests, advance, record_file.parent)
    trials = Trials(bundle, reference, prober, form, options.threads, console)
    trial = trials.run(chosen.plan, "answers after")
    if options.max_kl is not None:
        trial = fit_budget(trials, trial, options.max_kl, console)
        if trial.kept:
            console.say(f"left as they are, to hold the budget: {', '.join(map(name, trial.kept))}")
    report = _report(bundle, source, record, tests, options, form, chosen, trial, reference)
    write_quantized(
        source,
        output,
        trial.plan,
        form=form,
        record={REPORT_JSON: report.json().encode(), REPORT_HTML: page(report).encode()},
        overwrite=overwrite,
        console=console,
    )
    return report


def _observe(
    bundle: Bundle,
    graph: onnx.ModelProto,
    matrices: Sequence[Matrix],
    examples: Sequence[Example],
    options: Options,
    file: Path,
    console: Console,
) -> Record:
    """The complete record: read, completed or made."""
    origin = Origin(
        bundle=bundle_hash(bundle.manifest),
        name=bundle.manifest.name,
        data=digest(examples),
        examples=len(examples),
        seed=options.seed,
        max_tiles=options.max_tiles,
        max_new_tokens=options.max_new_tokens,
        matrices=tuple(matrix.name for matrix in matrices),
    )
    if file.exists():
        record = Record.load(file)
        record.require(origin, file)
        console.say(f"{file}: {record.done} of {len(examples)} examples have been observed")
    else:
        record = Record.nothing(origin, [matrix.channels for matrix in matrices])
    if not record.complete:
        known = {matrix.name: matrix for matrix in find_matrices(graph)}
        observed = [known[matrix] for matrix in record.origin.matrices]
        started, before = time.perf_counter(), record.done
        with console.bar("observing", len(examples)) as advance:
            observe(bundle, graph, observed, examples, record, file, advance, options.threads)
        seconds = time.perf_counter() - started
        console.say(f"observed {len(examples) - before} examples in {seconds:.0f} s; the record is {file}")
    return record


def require_same(bundle: Bundle, other: Bundle, matrices: Sequence[Matrix]) -> None:
    """Checks that another bundle holds the same model in another number format.

    Raises:
        CalibrationError: it does not.
    """
    advice = "export both from one checkpoint"
    for item in ("model", "image"):
        if getattr(bundle.manifest, item) != getattr(other.manifest, item):
            raise CalibrationError(f"{other.folder} is another model than {bundle.folder} ({item}): {advice}")
    if bundle.manifest.files[TOKENIZER] != other.manifest.files[TOKENIZER]:
        raise CalibrationError(f"{other.folder} has another tokenizer than {bundle.folder}: {advice}")
    ours, theirs = DecoderWeights(bundle), DecoderWeights(other)
    for matrix in matrices:
        block, given = next(ours.blocks(matrix.name)), next(theirs.stored(matrix.name))
        if not np.array_equal(block.astype(given.dtype), given):
            raise CalibrationError(f"{other.folder} has other weights than {bundle.folder} ({matrix.name}): {advice}")


def _report(
    bundle: Bundle,
    source: Bundle,
    record: Record,
    tests: Sequence[Example],
    options: Options,
    form: str,
    chosen: Chosen,
    trial: Trial,
    reference: Reference,
) -> Report:
    kept = {matrix.name for matrix in trial.plan.matrices}
    return calibration_report(
        bundle=source.manifest,
        record=record,
        tests=digest(tests),
        settings={
            "mode": options.choice.mode,
            "form": form,
            "experts": list(options.experts),
            "attention": options.attention,
            "lm_head": options.lm_head,
            "kv_cache": options.kv_cache,
            "weights": options.choice.weights,
            "activations": options.choice.activations if options.choice.mode == "w8a8" else None,
            "smoothing": options.choice.smoothing,
            "max_kl": options.max_kl,
            "seed": options.seed,
        },
        matrices=[matrix for matrix in chosen.matrices if matrix.name in kept],
        kept=[name(layer) for layer in trial.kept],
        sensitivity={name(layer): value for layer, value in trial.sensitivity.items()},
        comparison=trial.comparison,
        speeds=(reference.speed, trial.speed),
        sizes=(stored_size(source.manifest), weights_size(source, trial.plan, form)),
        tokenizer=reference.tokenizer,
    )
