"""What a calibration or a comparison found, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.data import digest
from calibration.observed.record import Record, bundle_hash
from calibration.scales.choose import MatrixReport
from calibration.trial.budget import Trial, layer_name
from calibration.trial.measure import KINDS, Comparison
from runtime.bench.machine import versions
from runtime.bundle.manifest import DECODER_WEIGHTS, VISUAL_DECODER_WEIGHTS, Manifest
from runtime.bundle.reader import size_text

FORMAT = "monoedge-calibration-1"

WORST = 10
"""How many questions the report lists: those whose answers moved most."""

ROWS = (
    ("questions", "questions", "{:,}"),
    ("tokens compared", "tokens", "{:,}"),
    ("same answer", "same_answers", "{:.2%}"),
    ("mean KL, nats", "mean_kl", "{:.2e}"),
    ("99th percentile of KL", "p99_kl", "{:.2e}"),
    ("same most probable token", "same_top1", "{:.2%}"),
    ("overlap of the top 5", "top5_overlap", "{:.2%}"),
    ("perplexity, after / before", "perplexity_ratio", "{:.5f}"),
)
"""Rows of the table of figures: title, name in ``Figures``, and format."""


@dataclass
class Report:
    """What a calibration or a comparison found.

    Attributes:
        values: the content of the JSON file.
        divergences: the KL divergence of every position by kind of question, for the charts.
    """

    values: dict[str, Any]
    divergences: dict[str, npt.NDArray[np.float64]]

    def json(self) -> str:
        """Returns the values as JSON, indented, with a line break at the end."""
        return json.dumps(self.values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> list[list[str]]:
        """Returns the figures as rows of cells. The first row holds the headings."""
        figures: Mapping[str, Any] = self.values["figures"]
        titles = {"all": "all questions", "image": "about images", "text": "text only"}
        columns = [kind for kind in titles if figures[kind] is not None]
        return (
            [["", *(titles[kind] for kind in columns)]]
            + [[title, *(form.format(figures[kind][name]) for kind in columns)] for title, name, form in ROWS]
            + [[title, cell, *[""] * (len(columns) - 1)] for title, cell in self._costs()]
        )

    def _costs(self) -> Iterator[tuple[str, str]]:
        values = self.values
        sizes, speeds = ([values[name][when] for when in ("before", "after")] for name in ("sizes", "speed"))
        yield "decoder's weights", " → ".join(map(size_text, sizes))
        if all(speed["tokens_per_second"] for speed in speeds):
            rates = (f"{speed['tokens_per_second']:.1f}" for speed in speeds)
            yield "decode on this CPU, tokens/s", " → ".join(rates)
        yield "reading a prompt on this CPU, s", " → ".join(f"{speed['prompt_mean']:.2f}" for speed in speeds)


def calibration_report(
    bundle: Manifest, record: Record, settings: dict[str, Any], matrices: list[MatrixReport], trial: Trial, size: int
) -> Report:
    """Makes the report of a calibration.

    Args:
        bundle: the bundle that is quantized.
        record: what was observed.
        settings: the options, by name.
        matrices: the quantized matrices.
        trial: the plan that was taken, measured.
        size: of the quantized decoder's weights, in bytes.
    """
    origin = record.origin
    head = {
        "bundle": {"name": bundle.name, "precision": bundle.precision, "sha256": bundle_hash(bundle)},
        "observed": {"bundle": origin.bundle, "data": origin.data, "examples": origin.examples},
        "settings": settings,
    }
    tail = {
        "kept": [layer_name(layer) for layer in trial.kept],
        "sensitivity": {layer_name(layer): value for layer, value in trial.sensitivity.items()},
        "matrices": [asdict(matrix) for matrix in matrices],
    }
    return _report(head, trial.comparison, (stored_size(bundle), size), tail)


def comparison_report(before: Manifest, after: Manifest, comparison: Comparison) -> Report:
    """Makes the report of a comparison of two bundles."""
    bundles = {
        when: {
            "name": manifest.name,
            "precision": manifest.precision,
            "quantization": asdict(manifest.quantization) if manifest.quantization else None,
            "sha256": bundle_hash(manifest),
        }
        for when, manifest in (("before", before), ("after", after))
    }
    return _report({"compared": bundles}, comparison, (stored_size(before), stored_size(after)), {})


def stored_size(manifest: Manifest) -> int:
    """Returns how many bytes the weights of a bundle's decoder take."""
    names = (DECODER_WEIGHTS, VISUAL_DECODER_WEIGHTS)
    return sum(manifest.files[name].size for name in names if name in manifest.files)


def _report(head: dict[str, Any], comparison: Comparison, sizes: tuple[int, int], tail: dict[str, Any]) -> Report:
    figures = {kind: comparison.figures(None if kind == "all" else kind) for kind in ("all", *KINDS)}
    speeds = {"before": comparison.before, "after": comparison.after}
    values = {
        "format": FORMAT,
        **head,
        "tested": {"data": digest([answered.example for answered, _ in comparison.answers])},
        "software": versions(("monoedge", "onnxruntime", "onnxruntime-gpu", "numpy")),
        "figures": {kind: found and asdict(found) for kind, found in figures.items()},
        "sizes": dict(zip(("before", "after"), sizes, strict=True)),
        "speed": {
            when: {"prompt_mean": speed.prompt_mean, "tokens_per_second": speed.tokens_per_second}
            for when, speed in speeds.items()
        },
        "worst": _worst(comparison),
        **tail,
    }
    return Report(values, {kind: comparison.table(kind)[:, 0] for kind in KINDS})


def _worst(comparison: Comparison) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = [
        {
            "place": answered.example.place,
            "prompt": answered.example.prompt,
            "answer": answered.text,
            "mean_kl": float(np.mean([row[0] for row in rows])),
            "same": all(row[1] for row in rows),
        }
        for answered, rows in comparison.answers
    ]
    return sorted(items, key=lambda item: item["mean_kl"], reverse=True)[:WORST]
