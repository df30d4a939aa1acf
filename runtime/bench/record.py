"""The protocol of ``runtime.bench``: the workload that a contender gets, and the record that it prints.

A contender is any command that takes the options of ``workload_parser`` and prints one ``Record`` as a line of JSON:
``runtime.bench.bundle`` is the one for bundles.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from runtime.bench.machine import Memory
from runtime.console.run import MOST
from runtime.errors import MonoedgeError
from runtime.options import require_whole


@dataclass(frozen=True)
class Workload:
    """What every contender does.

    Attributes:
        text_tokens: text tokens of the prompt.
        tiles: tiles of its picture; 0 for none.
        new_tokens: tokens to generate; the stop token is ignored.
        warmup: answers before those that count.
        repeats: answers that count, each with fresh caches.
        threads: CPU threads to compute with; None for the contender's choice.
    """

    text_tokens: int
    tiles: int
    new_tokens: int
    warmup: int
    repeats: int
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"text_tokens": 1, "tiles": 0, "new_tokens": 2, "warmup": 0, "repeats": 1, "threads": 1}
        for name, smallest in least.items():
            require_whole(f"--{name.replace('_', '-')}", getattr(self, name), smallest, MOST)

    def arguments(self) -> list[str]:
        """Returns the workload as options of a command line."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def workload_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Makes the parser of a command line with the options of a workload; the contender adds its own."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("the workload, as python -m runtime.bench gives it")
    for field in fields(Workload):
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, type=int, metavar="N", required=field.name != "threads")
    return parser


def workload(arguments: argparse.Namespace) -> Workload:
    """Returns the workload of a command line; an OptionError names a number that is out of range."""
    return Workload(**{field.name: getattr(arguments, field.name) for field in fields(Workload)})


@dataclass(frozen=True)
class Record:
    """What one process measured: times in seconds, sizes in bytes. Lists have an entry for each answer that counts.

    Attributes:
        contender: ``Loaded.facts``.
        software: versions.
        prompt_tokens: tokens of the prompt, visual ones included.
        visual_tokens: those of its picture.
        load: time until the model is ready, the backend's imports included.
        cold_first_token: time to the first token of the process's first answer.
        image: time to cut the picture and encode its tiles.
        first_token: time to the first token; ``image`` is part of it, tokenizing is not.
        steps: the time of every token after the first.
        memory: the largest values of all samples.
        weight_bytes: as in ``Loaded``.
    """

    contender: dict[str, str]
    software: dict[str, str]
    prompt_tokens: int
    visual_tokens: int
    load: float
    cold_first_token: float
    image: list[float]
    first_token: list[float]
    steps: list[list[float]]
    memory: Memory
    weight_bytes: int

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Reads what ``to_json`` wrote.

        Raises:
            MonoedgeError: it is not a record.
        """
        try:
            values: dict[str, Any] = json.loads(line)
            return cls(**{**values, "memory": Memory(**values["memory"])})
        except (ValueError, TypeError, KeyError) as error:
            raise MonoedgeError(f"expected a record as the last line of a contender's output: {error}") from None

    def to_json(self) -> str:
        """Returns the record as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)
