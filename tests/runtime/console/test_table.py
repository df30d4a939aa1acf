"""Tables as they are shown."""

from __future__ import annotations

from runtime.console.table import aligned, markdown

ROWS = [["", "before", "after"], ["tokens", "7", "12"], ["KL, nats", "1.5e-3", ""]]


def test_for_a_terminal() -> None:
    assert aligned(ROWS).splitlines() == [
        "          before  after",
        "tokens         7     12",
        "KL, nats  1.5e-3",
    ]


def test_in_markdown() -> None:
    assert markdown(ROWS).splitlines() == [
        "|          | before | after |",
        "|----------|--------|-------|",
        "| tokens   | 7      | 12    |",
        "| KL, nats | 1.5e-3 |       |",
    ]
