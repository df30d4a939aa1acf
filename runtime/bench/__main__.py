"""``python -m runtime.bench``: how fast a bundle answers here, and what memory it takes; alone or beside others."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from runtime.backends import DEFAULT
from runtime.bench.machine import cached_part, drop_cached, machine_facts, matmul_speed, read_bandwidth
from runtime.bench.record import Record, Workload
from runtime.bench.table import case_table, context_table, decode_rates, header
from runtime.bundle.reader import Bundle
from runtime.console.console import Console
from runtime.console.files import replaced, require_output
from runtime.console.run import MOST, make_parser, run
from runtime.errors import MonoedgeError, OptionError
from runtime.loaded import BUNDLE_VARIABLE
from runtime.options import require_whole
from runtime.records import is_folder, user_path

_DESCRIPTION = """\
Measures a bundle: time to load, time to first token, prefill and decode in tokens a second, memory. Each prompt is
measured in its own processes, so that memory is counted for it alone. Contenders take turns, so that a machine that
slows down slows all of them. Prints tables in Markdown: medians with the smallest and largest value.

examples:
  python -m runtime.bench --bundle bundle/                                   # a picture of one tile and a question
  python -m runtime.bench --bundle bundle/ --tiles 0 1 7                     # text alone, one tile, seven
  python -m runtime.bench --bundle bundle/ --tiles --context 300 4000        # text of 300 tokens, and of 4000
  python -m runtime.bench --bundle bundle/ --cold --warmup 0 --repeats 1     # nothing in the page cache
  python -m runtime.bench --bundle bundle/ --compare bundle-int8/ --json run.json
  python -m runtime.bench --bundle bundle/ --compare "python benchmarks/eager.py --ckpt CKPT --dtype bf16"

A contender is a bundle's folder, or in quotes any command that takes --text-tokens, --tiles, --new-tokens, --warmup,
--repeats and --threads, and prints a record as python -m runtime.bench.bundle does; that one takes --backend, to set
backends beside each other. benchmarks/eager.py is PyTorch, benchmarks/llama.py llama.cpp.

Prompts are random tokens of exactly the given length, and the stop token is ignored. Time to first token is counted
from a picture in memory and a prompt in tokens. Run it on an idle machine: the header gives the load average, and how
fast memory was read before and after."""

_FACTS = ("text_tokens", "tiles", "context", "new_tokens", "rounds", "warmup", "repeats", "threads", "cold")
"""The options that the results name."""


def main() -> None:
    """Reads the command line, measures, and prints the tables."""
    arguments = _parser().parse_args()
    if not arguments.bundle:
        raise OptionError(f"expected --bundle DIR, or the environment variable {BUNDLE_VARIABLE}")
    if arguments.json is not None:
        require_output(arguments.json, "--json")
    require_whole("--rounds", arguments.rounds, 1, MOST)
    cases = _cases(arguments)
    contenders = [_Contender(text, arguments.backend, cases) for text in (arguments.bundle, *arguments.compare)]

    console = Console()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_facts(),
        "workload": {name: getattr(arguments, name) for name in _FACTS},
        "speed_before": _speed(),
        "contenders": [{"command": contender.command, "cases": contender.cases} for contender in contenders],
    }
    _measure(contenders, cases, arguments, results["speed_before"]["bytes_per_second"], console)
    results["speed_after"] = _speed()
    tables = [header(results), *(case_table(results, index) for index in range(len(cases))), context_table(results)]
    console.write("\n\n".join(table for table in tables if table is not None) + "\n")
    if arguments.json is not None:
        try:
            with replaced(arguments.json) as partial:
                text = json.dumps(results, indent=1, ensure_ascii=False, default=asdict)
                partial.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise MonoedgeError(f"--json: {arguments.json} cannot be written: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("runtime.bench", _DESCRIPTION, "%(prog)s --bundle DIR [--compare CONTENDER...] [options]")
    add = parser.add_argument
    variable = f"(default: the environment variable {BUNDLE_VARIABLE})"
    add("--bundle", default=os.environ.get(BUNDLE_VARIABLE), metavar="DIR", help=f"what to measure {variable}")
    add("--compare", nargs="+", action="extend", default=[], metavar="CONTENDER", help="bundles or commands beside it")
    add("--backend", metavar="NAME", help=f"what computes the bundles (default {DEFAULT})")
    add("--threads", type=int, metavar="N", help="CPU threads to compute with (default: the contender's choice)")
    add("--json", type=Path, metavar="FILE", help="also write every measurement to FILE")

    add = parser.add_argument_group("prompts").add_argument
    add("--text-tokens", type=int, default=54, metavar="N", help="text around the picture (default 54)")
    add("--tiles", type=int, nargs="*", default=[1], metavar="N", help="tiles of the picture, 0 for none (default 1)")
    add("--context", type=int, nargs="+", default=[], metavar="N", help="prompts of N text tokens and no picture too")
    add("--new-tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")

    add = parser.add_argument_group("repetition").add_argument
    add("--rounds", type=int, default=3, metavar="N", help="processes for each prompt (default 3)")
    add("--warmup", type=int, default=1, metavar="N", help="answers first, not counted (default 1)")
    add("--repeats", type=int, default=3, metavar="N", help="answers that count (default 3)")
    add("--cold", action="store_true", help="drop bundles from the page cache before each process")
    return parser


def _cases(arguments: argparse.Namespace) -> list[Workload]:
    base = Workload(
        arguments.text_tokens, 0, arguments.new_tokens, arguments.warmup, arguments.repeats, arguments.threads
    )
    cases = [replace(base, tiles=tiles) for tiles in arguments.tiles]
    cases += [replace(base, text_tokens=tokens) for tokens in arguments.context]
    if not cases:
        raise OptionError("nothing to measure: give --tiles or --context a number")
    return list(dict.fromkeys(cases))


def _speed() -> dict[str, float]:
    return {"bytes_per_second": read_bandwidth(), "flops": matmul_speed()}


class _Contender:
    """One of those compared: a bundle, or a command that prints records; what is neither is refused."""

    def __init__(self, text: str, backend: str | None, cases: list[Workload]) -> None:
        self.text = text
        self.cases: list[dict[str, Any]] = [
            {"title": "", "workload": asdict(case), "cached_before": [], "bytes_per_second": [], "records": []}
            for case in cases
        ]
        self.folder = user_path(text) if " " not in text or is_folder(user_path(text)) else None
        if self.folder is not None:
            Bundle(self.folder)  # refused now, not by the first process
            self.command = [sys.executable, "-m", "runtime.bench.bundle", "--bundle", str(self.folder)]
            self.command += ["--backend", backend] if backend else []
            return
        try:
            self.command = shlex.split(text)
        except ValueError as error:
            raise OptionError(f"--compare: {text!r} is no command ({error})") from None
        if shutil.which(self.command[0]) is None:
            raise OptionError(f"--compare: {text!r}: no program {self.command[0]!r} is here, nor is it a bundle")

    def measure(self, what: Workload) -> Record:
        """Runs a process and reads its record."""
        command = [*self.command, *what.arguments()]
        # A SIGTERM waits until the process has started: one that came on the way would leave it running.
        late: list[int] = []
        handler = signal.signal(signal.SIGTERM, lambda number, frame: late.append(number))
        with subprocess.Popen(  # noqa: S603 - as asked for
            command, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        ) as process:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            try:
                signal.signal(signal.SIGTERM, handler)
                for number in late:
                    signal.raise_signal(number)
                output = process.stdout.read()
            except BaseException:  # leaving the block would wait for its end
                process.terminate()
                raise
        if process.returncode:
            said = f"what it said stands above: {shlex.join(command)}"
            raise MonoedgeError(f"{self.text} stopped with exit code {process.returncode}; {said}")
        return Record.from_json(output.rstrip().rpartition("\n")[2])


def _measure(
    contenders: list[_Contender], cases: list[Workload], arguments: argparse.Namespace, before: float, console: Console
) -> None:
    """Fills in the contenders' cases, round by round. The last read bandwidth was ``before``."""
    numbers = range(len(cases))
    turns = [(contender, index) for _ in range(arguments.rounds) for index in numbers for contender in contenders]
    began = time.monotonic()
    for done, (contender, index) in enumerate(turns, start=1):
        case, found = cases[index], contender.cases[index]
        if contender.folder is not None:
            if arguments.cold:
                drop_cached(contender.folder)
            found["cached_before"].append(cached_part(contender.folder))
        record = contender.measure(case)
        # Beside each process: a virtual machine may read twice as fast in one minute as in the next.
        after = read_bandwidth()
        found["records"].append(record)
        found["bytes_per_second"].append([before, after])
        before, found["title"] = after, _title(case, record)
        left = (time.monotonic() - began) / done * (len(turns) - done)
        console.say(
            f"[{done:{len(str(len(turns)))}}/{len(turns)}] {contender.text}, {found['title']}: first token "
            f"{min(record.first_token):.2f} s, then {max(decode_rates(record)):.1f} tokens/s; about {left:.0f} s left"
        )


def _title(case: Workload, record: Record) -> str:
    text, tiles = f"{case.text_tokens} text tokens", f"{case.tiles} tile{'s' * (case.tiles > 1)}"
    return f"{text} and {tiles}, {record.prompt_tokens} tokens together" if case.tiles else text


if __name__ == "__main__":
    run(main)
