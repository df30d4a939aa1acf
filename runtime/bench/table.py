"""The measurements of ``runtime.bench`` as tables, in Markdown so that they can be pasted into one's notes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from runtime.bench.record import Record
from runtime.console.table import markdown

Values = Callable[[Record], Iterable[float | None]]


def _rate(count: Callable[[Record], int], seconds: Callable[[Record], Iterable[float]]) -> Values:
    return lambda record: [count(record) / each if each > 0 else None for each in seconds(record)]


def _prefill_seconds(record: Record) -> list[float]:
    return [total - image for total, image in zip(record.first_token, record.image, strict=True)]


def decode_rates(record: Record) -> list[float]:
    """Tokens per second after the first token, one value an answer."""
    return [len(steps) / sum(steps) for steps in record.steps]


def _late_steps(record: Record) -> list[float]:
    """The step time that 19 of 20 steps stay below, one value an answer."""
    return [sorted(steps)[-(-19 * len(steps) // 20) - 1] for steps in record.steps]


# Title, unit, values of a record. Each is shown as a median over all processes and answers.
_ROWS: tuple[tuple[str, float, Values], ...] = (
    ("load, s", 1, lambda record: [record.load]),
    ("first answer of a process: time to first token, s", 1, lambda record: [record.cold_first_token]),
    ("picture: cut and encoded, s", 1, lambda record: record.image if record.visual_tokens else []),
    ("time to first token, s", 1, lambda record: record.first_token),
    ("prefill, tokens/s", 1, _rate(lambda record: record.prompt_tokens, _prefill_seconds)),
    ("decode, tokens/s", 1, decode_rates),
    ("decode, 19 of 20 steps below, ms", 1e-3, _late_steps),
    ("peak memory, GB", 1e9, lambda record: [record.memory.peak]),
    ("anonymous memory, GB", 1e9, lambda record: [record.memory.anonymous]),
    ("mapped files in memory, GB", 1e9, lambda record: [record.memory.mapped]),
    ("memory of its own GPU, GB", 1e9, lambda record: [record.memory.gpu]),
)


def header(results: dict[str, Any]) -> str:
    """Machine, speeds and contenders."""
    machine = results["machine"]
    before, after = (results[f"speed_{when}"] for when in ("before", "after"))
    workload = results["workload"]
    lines = [
        f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.1f} GiB; "
        f"{machine['gpu'] or 'no NVIDIA GPU seen'}",
        f"          {machine['system']}; power mode: {machine['power_mode']}; load average before: "
        f"{machine['load_average_before']:.1f}",
        f"reads     {before['bytes_per_second'] / 1e9:.1f} GB/s from memory before, "
        f"{after['bytes_per_second'] / 1e9:.1f} after; multiplies {before['flops'] / 1e9:.0f} GFLOP/s (numpy, "
        f"float32) before, {after['flops'] / 1e9:.0f} after",
        f"workload  {workload['new_tokens']} tokens generated, {workload['warmup']} answers to warm up, then "
        f"{workload['repeats']} that count, in each of {workload['rounds']} processes; threads: "
        f"{workload['threads'] or 'the choice of each'}"
        + ("; files dropped from the page cache before each process" if workload["cold"] else ""),
    ]
    software: dict[str, str] = {}
    for letter, contender in zip(letters(results), results["contenders"], strict=True):
        record = contender["cases"][0]["records"][0]
        facts = record.contender
        lines.append(f"{letter}         {facts['name']}; {facts['precision']}; {facts['computes']}")
        if record.software != software:
            software = record.software
            lines.append("          " + ", ".join(f"{name} {number}" for name, number in software.items()))
    return "\n".join(lines)


def letters(results: dict[str, Any]) -> list[str]:
    """One a contender."""
    return [chr(ord("A") + index) for index in range(len(results["contenders"]))]


def case_table(results: dict[str, Any], index: int) -> str:
    """All measurements of one prompt; ratios are to the first contender."""
    cases = [contender["cases"][index] for contender in results["contenders"]]

    def reading(record: Record) -> list[float]:
        return [rate * record.weight_bytes for rate in decode_rates(record)]

    rows = (*_ROWS, ("weights read while decoding, GB/s", 1e9, reading))
    table = [[cases[0]["title"], *letters(results)]]
    for title, unit, values in rows:
        columns = [[value for record in case["records"] for value in values(record)] for case in cases]
        cells = _cells([[value / unit for value in column if value is not None] for column in columns])
        if any(cells):
            table.append([title, *cells])
    beside = [case["bytes_per_second"] for case in cases]
    shares = [
        [100 * rate / max(near) for record, near in zip(case["records"], own, strict=True) for rate in reading(record)]
        for case, own in zip(cases, beside, strict=True)
    ]
    read = [[speed / 1e9 for near in own for speed in near] for own in beside]
    table.append(["the same, % of the next line's larger value", *(_cells([column])[0] for column in shares)])
    table.append(["the cores read just before and after, GB/s", *(_cells([column])[0] for column in read)])
    cached = [_cells([[100 * part for part in case["cached_before"] if part is not None]])[0] for case in cases]
    if any(cached):
        table.append(["of the bundle in the page cache before, %", *cached])
    return markdown(table)


def context_table(results: dict[str, Any]) -> str | None:
    """Decoding by what the caches hold; None for a single length."""
    lengths = [case["records"][0].prompt_tokens for case in results["contenders"][0]["cases"]]
    if len(set(lengths)) < 2:
        return None
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    table = [["decode, tokens/s; share of the rate at the shortest", *letters(results)]]
    first: list[float] = []
    for index in order:
        rates = [
            statistics.median(rate for record in contender["cases"][index]["records"] for rate in decode_rates(record))
            for contender in results["contenders"]
        ]
        first = first or rates
        cells = [f"{_number(rate)}, {rate / base:.2f}" for rate, base in zip(rates, first, strict=True)]
        table.append([f"after {results['contenders'][0]['cases'][index]['title']}", *cells])
    return markdown(table)


def _cells(columns: list[list[float]]) -> list[str]:
    medians = [statistics.median(column) if column else None for column in columns]
    cells = []
    for index, (median, column) in enumerate(zip(medians, columns, strict=True)):
        if median is None:
            cells.append("")
            continue
        cell = _number(median)
        if (least := _number(min(column))) != (most := _number(max(column))):
            cell += f" ({least} … {most})"
        if index and medians[0]:
            cell += f", ×{_number(median / medians[0])}"
        cells.append(cell)
    return cells


def _number(value: float) -> str:
    """Three digits, which is more than times repeat to."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")
