"""What a calibration or a comparison found, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.observed.record import Record, bundle_hash
from calibration.scales.choose import MatrixReport
from calibration.trial.measure import KINDS, Comparison, Figures, Speed
from runtime.bundle.manifest import DECODER_WEIGHTS, VISUAL_DECODER_WEIGHTS, Manifest
from runtime.bundle.reader import size_text
from runtime.text.tokenizer import Tokenizer

FORMAT = "monoedge-calibration-1"

WORST = 10
"""Questions that the report tells of: those that moved most."""

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
"""Rows of the table of figures: what it is called, its name in ``Figures``, and how it is written."""


@dataclass
class Report:
    """A report.

    Attributes:
        values: what the JSON file says.
        divergences: KL of every position by kind of question, for the charts.
    """

    values: dict[str, Any]
    divergences: dict[str, npt.NDArray[np.float64]]

    def json(self) -> str:
        """Indented, with a line break at the end."""
        return json.dumps(self.values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> list[list[str]]:
        """The figures: a row of headings, then a row each."""
        figures: Mapping[str, Any] = self.values["figures"]
        columns = [kind for kind in ("all", *KINDS) if figures[kind] is not None]
        rows = [["", *("all questions" if kind == "all" else f"about {kind}s" for kind in columns)]]
        if "text" in columns:
            rows[0][-1] = "text only"
        return (
            rows
            + [[title, *(form.format(figures[kind][name]) for kind in columns)] for title, name, form in ROWS]
            + [[title, *cells, *[""] * (len(columns) - len(cells))] for title, cells in self._costs()]
        )

    def text(self) -> str:
        """The table for a terminal."""
        rows = self.table()
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        )

    def _costs(self) -> list[tuple[str, list[str]]]:
        values, costs = self.values, []
        before, after = values["sizes"]["before"], values["sizes"]["after"]
        costs.append(("decoder's weights", [f"{size_text(before)} → {size_text(after)}"]))
        speeds = [values["speed"][when] for when in ("before", "after")]
        if all(speed["tokens_per_second"] for speed in speeds):
            costs.append(
                ("decode on this CPU, tokens/s", [" → ".join(f"{speed['tokens_per_second']:.1f}" for speed in speeds)])
            )
        costs.append(
            ("reading a prompt on this CPU, s", [" → ".join(f"{speed['prompt_mean']:.2f}" for speed in speeds)])
        )
        return costs


def calibration_report(
    bundle: Manifest,
    record: Record,
    tests: str,
    settings: Mapping[str, Any],
    matrices: Sequence[MatrixReport],
    kept: Sequence[str],
    sensitivity: Mapping[str, float],
    comparison: Comparison,
    speeds: tuple[Speed, Speed],
    sizes: tuple[int, int],
    tokenizer: Tokenizer,
) -> Report:
    """The report of a calibration.

    Args:
        bundle: manifest of the bundle that was quantized.
        record: what was observed.
        tests: hash of the questions that were measured with.
        settings: the options, by name.
        matrices: those that were quantized.
        kept: layers that the budget left as they are.
        sensitivity: mean KL of each layer alone; empty where it was not measured.
        comparison: how far answers moved.
        speeds: before and after.
        sizes: of the decoder's weights before and after, in bytes.
        tokenizer: of the bundle.
    """
    origin = record.origin
    return _report(
        {
            "format": FORMAT,
            "bundle": {"name": bundle.name, "precision": bundle.precision, "sha256": bundle_hash(bundle)},
            "observed": {"bundle": origin.bundle, "data": origin.data, "examples": origin.examples},
            "tested": {"data": tests},
            "settings": dict(settings),
        },
        comparison,
        speeds,
        sizes,
        tokenizer,
        {
            "kept": list(kept),
            "sensitivity": dict(sensitivity),
            "matrices": [asdict(matrix) for matrix in matrices],
        },
    )


def comparison_report(
    before: Manifest,
    after: Manifest,
    tests: str,
    comparison: Comparison,
    speeds: tuple[Speed, Speed],
    sizes: tuple[int, int],
    tokenizer: Tokenizer,
) -> Report:
    """The report of a comparison of two bundles; arguments as above."""
    bundles = {
        when: {
            "name": manifest.name,
            "precision": manifest.precision,
            "quantization": asdict(manifest.quantization) if manifest.quantization else None,
            "sha256": bundle_hash(manifest),
        }
        for when, manifest in (("before", before), ("after", after))
    }
    head = {"format": FORMAT, "compared": bundles, "tested": {"data": tests}}
    return _report(head, comparison, speeds, sizes, tokenizer, {})


def stored_size(manifest: Manifest) -> int:
    """Bytes of a decoder's weights, as they lie in the bundle."""
    names = (DECODER_WEIGHTS, VISUAL_DECODER_WEIGHTS)
    return sum(manifest.files[name].size for name in names if name in manifest.files)


def _report(
    head: dict[str, Any],
    comparison: Comparison,
    speeds: tuple[Speed, Speed],
    sizes: tuple[int, int],
    tokenizer: Tokenizer,
    tail: dict[str, Any],
) -> Report:
    values = {
        **head,
        "software": _software(),
        "figures": {kind: _figures(comparison.figures(None if kind == "all" else kind)) for kind in ("all", *KINDS)},
        "sizes": dict(zip(("before", "after"), sizes, strict=True)),
        "speed": {
            when: {"prompt_mean": speed.prompt_mean, "tokens_per_second": speed.tokens_per_second}
            for when, speed in zip(("before", "after"), speeds, strict=True)
        },
        "worst": _worst(comparison, tokenizer),
        **tail,
    }
    return Report(values, {kind: comparison.table(kind)[:, 0] for kind in KINDS})


def _figures(figures: Figures | None) -> dict[str, float] | None:
    return asdict(figures) if figures is not None else None


def _worst(comparison: Comparison, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    means = [(float(np.mean([row[0] for row in rows])), answered, rows) for answered, rows in comparison.answers]
    means.sort(key=lambda item: item[0], reverse=True)
    return [
        {
            "place": answered.example.place,
            "prompt": answered.example.prompt,
            "answer": tokenizer.decode(answered.ids),
            "mean_kl": mean,
            "same": all(row[1] for row in rows),
        }
        for mean, answered, rows in means[:WORST]
    ]


def _software() -> dict[str, str]:
    found = {}
    for package in ("monoedge", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
