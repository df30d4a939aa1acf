"""A record as a table: what was observed of which bundle, matrix by matrix."""

from __future__ import annotations

from pathlib import Path

from calibration.observed.record import Record
from calibration.observed.statistics import Rows, merged, outliers
from runtime.console.table import aligned


def inspect(file: Path) -> str:
    """Returns a record as a table; raises as ``Record.load`` does."""
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
        figures = ["–"] * 4
        if phases := observed.phases:
            ends = min(phase.low.min() for phase in phases), max(phase.high.max() for phase in phases)
            square = sum(phase.squares.sum() for phase in phases) / (observed.rows * observed.prompt.channels)
            figures = [*(f"{value:.4g}" for value in (*ends, float(square) ** 0.5)), _outliers(observed.absmax)]
        rows.append((name, f"{observed.prompt.rows:,}", f"{observed.generated.rows:,}", *figures))
    caches = [("cache", "largest", "outliers")]
    caches += [(name, f"{largest.max():.4g}", _outliers(largest)) for name, largest in record.caches.items()]
    note = "outliers: the largest magnitude of a channel, divided by that of the median channel"
    return "\n".join([*lines, aligned(rows), "", aligned(caches), "", note])


def _outliers(largest: Rows) -> str:
    found = outliers(largest)
    return "–" if found is None else f"{found:.3g}"
