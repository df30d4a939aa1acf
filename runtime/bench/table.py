"""The measurements of ``runtime.bench`` as tables, in Markdown so that they can be pasted into one's notes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from runtime.bench.record import Record
from runtime.console.table import markdown

Values = Callable[[Record], Iterable[float | None]]


def _prefill_rates(record: Record) -> list[float]:
    seconds = (total - image for total, image in zip(record.first_token, record.image, strict=True))
    return [record.prompt_tokens / each for each in seconds if each > 0]


def decode_rates(record: Record) -> list[float]:
    """Returns the tokens per second after the first token, one value for each answer."""
    return [len(steps) / sum(steps) for steps in record.steps]


def _late_steps(record: Record) -> list[float]:
    """Returns the step time that 19 of 20 steps stay below, one value for each answer."""
    return [sorted(steps)[-(-19 * len(steps) // 20) - 1] for steps in record.steps]


def _read_rates(record: Record) -> list[float]:
    """Returns the bytes of weights read per second while decoding, one value for each answer."""
    return [rate * record.weight_bytes for rate in decode_rates(record)]


# Title, unit, values of a record. Each is shown as a median over all processes and answers.
_ROWS: tuple[tuple[str, float, Values], ...] = (
    ("load, s", 1, lambda record: [record.load]),
    ("first answer of a process: time to first token, s", 1, lambda record: [record.cold_first_token]),
    ("picture: cut and encoded, s", 1, lambda record: record.image if record.visual_tokens else []),
    ("time to first token, s", 1, lambda record: record.first_token),
    ("prefill, tokens/s", 1, _prefill_rates),
    ("decode, tokens/s", 1, decode_rates),
    ("decode, 19 of 20 steps below, ms", 1e-3, _late_steps),
    ("peak memory, GB", 1e9, lambda record: [record.memory.peak]),
    ("anonymous memory, GB", 1e9, lambda record: [record.memory.anonymous]),
    ("mapped files in memory, GB", 1e9, lambda record: [record.memory.mapped]),
    ("memory of its own GPU, GB", 1e9, lambda record: [record.memory.gpu]),
    ("weights read while decoding, GB/s", 1e9, _read_rates),
)


def header(results: dict[str, Any]) -> str:
    """Returns what stands above the tables: machine, speeds and contenders."""
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
    """Returns a letter for each contender."""
    return [chr(ord("A") + index) for index in range(len(results["contenders"]))]


def case_table(results: dict[str, Any], index: int) -> str:
    """Returns all measurements of one prompt; ratios are to the first contender."""
    cases = [contender["cases"][index] for contender in results["contenders"]]
    table = [[cases[0]["title"], *letters(results)]]
    for title, unit, values in _ROWS:
        found = [[value for record in case["records"] for value in values(record)] for case in cases]
        columns = [[value / unit for value in column if value is not None] for column in found]
        if any(columns):
            table.append([title, _cell(columns[0]), *(_cell(column, columns[0]) for column in columns[1:])])
    shares, read, cached = [], [], []
    for case in cases:
        beside = case["bytes_per_second"]
        pairs = zip(case["records"], beside, strict=True)
        shares.append([100 * rate / max(near) for record, near in pairs for rate in _read_rates(record)])
        read.append([speed / 1e9 for near in beside for speed in near])
        cached.append([100 * part for part in case["cached_before"] if part is not None])
    # Each for itself, without ratios.
    table.append(["the same, % of the next line's larger value", *map(_cell, shares)])
    table.append(["the cores read just before and after, GB/s", *map(_cell, read)])
    if any(cached):
        table.append(["of the bundle in the page cache before, %", *map(_cell, cached)])
    return markdown(table)


def context_table(results: dict[str, Any]) -> str | None:
    """Returns the rates of decoding by what the caches hold; None for a single length."""
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


def _cell(values: list[float], first: Sequence[float] = ()) -> str:
    """Returns the median, the smallest and largest value, and the ratio to the median of the first contender's."""
    if not values:
        return ""
    median, least, most = (_number(value) for value in (statistics.median(values), min(values), max(values)))
    cell = median if least == most else f"{median} ({least} … {most})"
    base = statistics.median(first) if first else 0
    return f"{cell}, ×{_number(statistics.median(values) / base)}" if base else cell


def _number(value: float) -> str:
    """Rounds to three digits, which is more than times repeat to."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")
