"""The report as one HTML page: no script, no other file, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from calibration.reporting import charts
from calibration.reporting.report import Report

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #8884; vertical-align: top; }
th:first-child, td:first-child, .words td { text-align: left; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; } code { font-size: .9em; word-break: break-all; }
p.note { color: #888; }
"""


def page(report: Report) -> str:
    """Returns a report as HTML."""
    values = report.values
    worst = [
        [item["place"], item["prompt"], item["answer"], _word(item["same"]), f"{item['mean_kl']:.2e}"]
        for item in values["worst"]
    ]
    title = f"Calibration of {values['bundle']['name']}" if "bundle" in values else "Two bundles compared"
    body = [
        f"<h1>{escape(title)}</h1>",
        _table(_settings(values)),
        "<h2>How far answers moved</h2>",
        '<p class="note">The bundle before gave the answers. At each of their tokens, the distributions of the next '
        "token before and after are compared.</p>",
        _table(report.table()[1:], report.table()[0]),
        charts.divergence_chart(report.divergences),
        *_matrices(values),
        "<h2>Questions whose answers moved most</h2>",
        _table(worst, ["place", "question", "answer before", "same after", "mean KL"], words=True),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _settings(values: dict[str, Any]) -> list[list[str]]:
    rows: list[tuple[str, object]] = []
    if "bundle" in values:
        rows += [("number format", values["bundle"]["precision"]), *values["settings"].items()]
        rows += [("examples observed", values["observed"]["examples"]), ("bundle", values["bundle"]["sha256"])]
        rows += [("data observed", values["observed"]["data"])]
        rows += [("layers left unquantized", ", ".join(values["kept"]) or "none")]
    else:
        for when, bundle in values["compared"].items():
            quantization = bundle["quantization"]
            what = f"{quantization['mode']}, {quantization['form']}" if quantization else "not quantized"
            rows.append((when, f"{bundle['name']}, {bundle['precision']}, {what}, {bundle['sha256']}"))
    rows += [("data measured with", values["tested"]["data"])]
    rows += [("software", ", ".join(f"{name} {version}" for name, version in values["software"].items()))]
    return [[key, _word(value)] for key, value in rows]


def _matrices(values: dict[str, Any]) -> Iterable[str]:
    if "matrices" not in values:
        return
    matrices = values["matrices"]
    if values["sensitivity"]:
        yield "<h2>Sensitivity of layers</h2>"
        yield charts.sensitivity_chart(values["sensitivity"], values["kept"])
    yield "<h2>Error by layer</h2>"
    yield '<p class="note">‖output - exact‖² / ‖exact‖² of the output of each matrix, on sampled activations.</p>'
    yield charts.layer_chart(matrices, "error", "relative squared error")
    yield "<h2>Activations</h2>"
    yield charts.range_chart(matrices)
    yield '<p class="note">Outliers: the largest magnitude of a channel, divided by that of the median channel.</p>'
    yield charts.layer_chart(matrices, "outliers", "outliers")
    if any(matrix["exponent"] is not None for matrix in matrices):
        yield "<h2>Smoothing exponents</h2>"
        yield charts.layer_chart(matrices, "exponent", "exponent", log=False)
    yield "<h2>Matrices</h2>"
    yield _table(
        [
            [
                matrix["name"],
                f"{matrix['error']:.2e}",
                _number(matrix["exponent"]),
                f"{matrix['low']:.4g} … {matrix['high']:.4g}",
                f"{matrix['outliers']:.3g}",
                _number(matrix["reach"]),
                " + ".join(f"{rows:,}" for rows in matrix["rows"]),
            ]
            for matrix in matrices
        ],
        ["matrix", "error", "exponent", "input", "outliers", "INT8 range / input", "rows: prompt + generated"],
    )


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), words: bool = False) -> str:
    lines = ['<div class="wide"><table class="words">' if words or not head else '<div class="wide"><table>']
    if head:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table></div>"])


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
