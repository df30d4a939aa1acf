"""A record for people: what was observed of which bundle, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibration.observed.record import Record
from calibration.observed.statistics import Rows, merged, outliers


def inspect(file: Path) -> str:
    """A record as a table.

    Raises:
        CalibrationError: the file is no record.
    """
    record = Record.load(file)
    origin = record.origin
    lines = [
        f"bundle    {origin.name}, {origin.bundle}",
        f"data      {origin.data}",
        f"examples  {record.done:,} of {origin.examples:,}, answers of up to {origin.max_new_tokens} tokens, "
        f"seed {origin.seed}",
        "",
    ]
    rows: list[tuple[str, ...]] = [("matrix", "rows: prompt", "generated", "lowest", "highest", "rms", "outliers")]
    for name, halves in record.observed.items():
        observed = merged(halves)
        phases, absmax = observed.phases, observed.absmax
        if not phases:
            rows.append((name, "0", "0", *["–"] * 4))
            continue
        squares = sum(phase.squares.sum() for phase in phases) / (observed.rows * len(absmax))
        rows.append(
            (
                name,
                f"{observed.prompt.rows:,}",
                f"{observed.generated.rows:,}",
                f"{min(phase.low.min() for phase in phases):.4g}",
                f"{max(phase.high.max() for phase in phases):.4g}",
                f"{float(squares) ** 0.5:.4g}",
                _outliers(absmax),
            )
        )
    caches: list[tuple[str, ...]] = [("cache", "largest", "outliers")]
    for name, largest in record.caches.items():
        caches.append((name, f"{largest.max():.4g}", _outliers(largest)))
    note = "outliers: the largest magnitude of a channel, over that of the middle channel"
    return "\n".join([*lines, *_table(rows), "", *_table(caches), "", note])


def _outliers(largest: Rows) -> str:
    found = outliers(largest)
    return "–" if found is None else f"{found:.3g}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
