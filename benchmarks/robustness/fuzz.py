"""Gives monoedge what an untrusted world gives it, and looks for tracebacks, hangs, wrong answers and lost memory."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile import damage, damage_json, hostile_text, hostile_value
from PIL import Image

import runtime
from calibration.data import read_examples
from export.checkpoint.reader import Checkpoint
from runtime.bench.machine import machine_facts
from runtime.console.run import run
from runtime.conversation import Conversation
from runtime.errors import MonoedgeError
from runtime.options import AnswerOptions

_DESCRIPTION = """\
Each input has a number, from which it is made; the same seed and number give the same input. An input is taken, or
refused by one of monoedge's errors in one line of at most 2,100 characters. With verify=True, a bundle that opens
answers as the undamaged one. Anything else is a fault, which is printed with its number.

examples:
  python benchmarks/robustness/fuzz.py --bundle bundle/ --ckpt checkpoint/ --count 1000
  python benchmarks/robustness/fuzz.py --bundle bundle/ --ckpt checkpoint/ --kind pictures --first 4711 --count 1"""

LONGEST_MESSAGE = 2100
"""Characters of an error."""
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""What Unicode calls characters that turn the direction of text."""
PATIENCE = 120
"""Seconds after which an input counts as a hang, on a busy machine too."""
MEMORY = 1 << 30
"""Bytes of anonymous and mapped memory that the process may have at its peak: what it has with torch and a bundle is
about a third of that."""
QUESTION = "How many shapes are there?"


class Fuzzer:
    """One kind of inputs after the other.

    Args:
        bundle: an fp32 bundle.
        checkpoint: the folder of a checkpoint.
        folder: where damaged files are written.
        seed: of all inputs.
    """

    def __init__(self, bundle: Path, checkpoint: Path, folder: Path, seed: int) -> None:
        self.bundle, self.checkpoint, self.folder, self.seed = bundle, checkpoint, folder, seed
        self.model = runtime.load(bundle)
        self.answer = self._answer(self.model)
        self.kinds: dict[str, Callable[[random.Random], object]] = {
            "bundles": self._try_bundle,
            "checkpoints": self._try_checkpoint,
            "pictures": self._try_picture,
            "prompts": self._try_prompt,
            "options": self._try_options,
            "data": self._try_data,
        }
        self.pictures = list(_pictures())

    def __call__(self, kind: str, number: int) -> str | None:
        """Tries one input; returns what is wrong, or None."""
        try:
            wrong = self.kinds[kind](random.Random(f"{self.seed} {kind} {number}"))  # noqa: S311 - repeatable
        except MonoedgeError as error:
            return None if _is_short_line(str(error)) else f"not one short line: {str(error)[:300]!r}"
        except BaseException:
            return traceback.format_exc()
        return wrong if isinstance(wrong, str) else None

    def _answer(self, model: runtime.Model) -> str:
        return model.session(prompt=QUESTION, max_new_tokens=8).text

    def _try_bundle(self, source: random.Random) -> str | None:
        folder = _copy(self.bundle, self.folder / "bundle")
        file = source.choice([path for path in folder.iterdir() if path.is_file()])
        _change(file, source, limit=1 << 20)
        verify = source.random() < 0.5
        found = self._answer(runtime.load(folder, verify=verify))
        return f"{file.name}: answered {found!r}, expected {self.answer!r}" if verify and found != self.answer else None

    def _try_checkpoint(self, source: random.Random) -> None:
        folder = _copy(self.checkpoint, self.folder / "checkpoint")
        _change(source.choice([path for path in folder.iterdir() if path.is_file()]), source, limit=1 << 16)
        Checkpoint(folder)

    def _try_picture(self, source: random.Random) -> str | None:
        data = source.choice(self.pictures)
        given: Any = damage(data, source) if source.random() < 0.9 else hostile_value(source)
        pixels = self.model.pixels(given, source.choice((None, 1, 2, 12)))
        return None if 1 <= len(pixels) <= 13 else f"cut into {len(pixels)} tiles"

    def _try_prompt(self, source: random.Random) -> str | None:
        model = self.model
        conversation = Conversation(model.template, model.tokenizer, 4, source.choice((None, hostile_text(source))))
        turns = [
            dataclasses.replace(conversation.turn(hostile_text(source), []), answer=hostile_text(source))
            for _ in range(source.randrange(3))
        ]
        prompt = conversation.prompt([*turns, conversation.turn(hostile_text(source), [])])
        model.tokenizer.decode(prompt.ids.tolist())
        model.tokenizer.decode(prompt.ids.tolist(), skip_special_tokens=False)
        return "a visual token without an image" if prompt.visual_mask.any() else None

    def _try_options(self, source: random.Random) -> None:
        names = [*(field.name for field in dataclasses.fields(AnswerOptions)), hostile_text(source)]
        AnswerOptions().changed({source.choice(names): hostile_value(source) for _ in range(source.randint(1, 4))})

    def _try_data(self, source: random.Random) -> None:
        lines = [{"image": None, "prompt": QUESTION, "answer": "red"}, {"image": ["a.png"], "prompt": "What is it?"}]
        (self.folder / "a.png").write_bytes(self.pictures[0])
        text = b"\n".join(damage_json(json.dumps(source.choice(lines)), source) for _ in range(source.randint(1, 4)))
        file = self.folder / "data.jsonl"
        file.write_bytes(text)
        read_examples(file)


def _is_short_line(message: str) -> bool:
    """Whether a message is no longer than it may be, and nothing in it moves a terminal's cursor or turns its text."""
    return len(message) <= LONGEST_MESSAGE and not any(
        unicodedata.category(letter) in {"Cc", "Cs", "Zl", "Zp"} or unicodedata.bidirectional(letter) in _TURNS
        for letter in message
    )


def _copy(folder: Path, target: Path) -> Path:
    """Links a folder's files into another, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, copy_function=os.link)
    return target


def _change(file: Path, source: random.Random, limit: int) -> None:
    """Damages a file, of a large one the first ``limit`` bytes; the linked original stays as it is."""
    data = file.read_bytes()
    file.unlink()
    head, rest = data[:limit], data[limit:]
    is_json = file.suffix == ".json" and not rest
    file.write_bytes(damage_json(head.decode(), source) if is_json else damage(head, source) + rest)


def _pictures() -> Iterator[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 4), np.uint8)
    for form, modes in (
        *(("PNG", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")), ("JPEG", ("RGB", "L", "CMYK"))),
        *(("WEBP", ("RGB", "RGBA")), ("GIF", ("P", "L")), ("BMP", ("RGB", "L"))),
        ("TIFF", ("RGB", "RGBA", "I;16", "F")),
    ):
        for mode in modes:
            file = io.BytesIO()
            # Pillow converts to some modes only by way of another.
            between = {"I;16": "I", "P": "RGB"}.get(mode, mode)
            Image.fromarray(pixels, "RGBA").convert(between).convert(mode).save(file, form)
            yield file.getvalue()


def main() -> None:
    """Reads the command line and tries inputs in a process of its own, which is started anew when one ends it."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="an fp32 bundle")
    parser.add_argument("--ckpt", required=True, type=Path, help="the folder of a checkpoint")
    parser.add_argument("--kind", action="append", help="bundles, checkpoints, pictures, prompts, options or data")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (default 0)")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="inputs of each kind (default 100)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of all inputs (default 1)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = arguments.kind or ["bundles", "checkpoints", "pictures", "prompts", "options", "data"]
    if arguments.child:
        return _child(arguments, kinds[0])
    print(json.dumps(machine_facts()))
    faults = sum(_parent(arguments, kind) for kind in kinds)
    if faults:
        raise MonoedgeError(f"{faults} faults")


def _child(arguments: argparse.Namespace, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(arguments.bundle, arguments.ckpt, Path(folder), arguments.seed)
        for number in range(arguments.first, arguments.first + arguments.count):
            print(json.dumps({"number": number}), flush=True)
            wrong = fuzzer(kind, number)
            if wrong is not None:
                print(json.dumps({"number": number, "wrong": wrong}), flush=True)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


def _parent(arguments: argparse.Namespace, kind: str) -> int:
    """Tries all inputs of a kind; returns the number of faults."""
    first, end, faults, peak = arguments.first, arguments.first + arguments.count, 0, 0
    while first < end:
        command = [sys.executable, __file__, "--child", "--kind", kind, "--seed", str(arguments.seed)]
        command += ["--bundle", str(arguments.bundle), "--ckpt", str(arguments.ckpt)]
        command += ["--first", str(first), "--count", str(end - first)]
        finished = False
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603
            watch = threading.Timer(PATIENCE, process.kill)
            watch.start()
            for line in process.stdout or ():
                watch.cancel()
                # What comes between our own lines was printed by a library.
                told = json.loads(line) if line[0] == "{" else {"number": first, "wrong": f"printed {line.strip()!r}"}
                if "peak" in told:
                    finished, peak = True, max(peak, told["peak"])
                elif "wrong" in told:
                    faults += 1
                    print(f"{kind} {told['number']}: {told['wrong']}", flush=True)
                else:
                    first = told["number"]
                    watch = threading.Timer(PATIENCE, process.kill)
                    watch.start()
            watch.cancel()
        if finished:
            break
        faults += 1
        print(f"{kind} {first}: ended the process, or took {PATIENCE} s: exit code {process.returncode}", flush=True)
        first += 1
    if peak > MEMORY:
        faults += 1
        print(f"{kind}: {peak >> 20} MiB at the peak, more than {MEMORY >> 20}", flush=True)
    print(f"{kind}: {arguments.count} inputs, {faults} faults, {peak >> 20} MiB at the peak", flush=True)
    return faults


if __name__ == "__main__":
    run(main)
