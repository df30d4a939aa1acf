"""Tables of text: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
"""Cells of text, as many in each row."""


def aligned(rows: Rows) -> str:
    """Lays out a table for a terminal: the first column to the left, the others to the right."""
    first, *others = _widths(rows)
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown(rows: Rows) -> str:
    """Lays out a table in Markdown; the first row holds the headings."""
    widths = _widths(rows)
    head, *lines = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines])


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
