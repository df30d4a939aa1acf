"""What a user may not read is called unreadable: a bundle, a checkpoint, data, an output.

Permissions do not stop root, so that these run as another user, who is made in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parent.parent
NOBODY = 65534
SCRIPT = """
import encodings.utf_8_sig  # Python itself may lie where only root reads
import os, sys
from pathlib import Path
from calibration.data import read_examples
from export.checkpoint.reader import Checkpoint, locate
from export.writer import BundleWriter
import runtime.backends.onnxruntime.backend
from runtime import load
from runtime.console.files import new_folder
from runtime.errors import MonoedgeError
from runtime.records import find, read_text
place = Path({place!r})
if os.geteuid() == 0:
    os.setgid({nobody})
    os.setuid({nobody})
try:
    {body}
except MonoedgeError as error:
    print(error)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may read, with one in it that nobody may: ``closed``."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "closed").mkdir()
        (Path(folder) / "closed").chmod(0)
        yield Path(folder)
        (Path(folder) / "closed").chmod(0o700)


def said(place: Path, body: str) -> str:
    """What the error says that this ends in."""
    script = SCRIPT.format(place=str(place), nobody=NOBODY, body=body)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def close(file: Path) -> None:
    """As ``chmod 600`` by another owner."""
    file.chmod(0 if os.geteuid() else 0o600)


@pytest.mark.parametrize(
    "body",
    [
        "read_text(place / 'closed/x')",
        "find(place / 'closed/x')",
        "load(place / 'closed/x')",
        "locate(str(place / 'closed/x'))",
        "read_examples(place / 'closed/x')",
        "BundleWriter(place / 'closed/x')",
    ],
)
def test_below_a_folder_that_may_not_be_read(place: Path, body: str) -> None:
    assert said(place, body) == f"{place}/closed/x cannot be read: Permission denied"


def test_an_output_where_nothing_may_be_written(place: Path) -> None:
    message = f"{place}/closed/x cannot be made: Permission denied"
    assert said(place, "new_folder(place / 'closed/x').__enter__()") == message


def test_data(place: Path) -> None:
    (place / "pairs.jsonl").write_text('{"image": "closed/x.png", "prompt": "What?"}\n')
    message = f"pairs.jsonl, line 1: .*'{place}/closed/x.png' cannot be read \\(Permission denied\\): check it"
    assert re.fullmatch(message, said(place, "read_examples(place / 'pairs.jsonl')"))
    close(place / "pairs.jsonl")
    message = f"{place}/pairs.jsonl cannot be read: Permission denied"
    assert said(place, "read_examples(place / 'pairs.jsonl')") == message


@pytest.mark.parametrize("name", ["manifest.json", "decoder.weights", "vision.onnx", "tokenizer.json"])
def test_a_file_of_a_bundle(place: Path, tiny_v1_bundle: Path, name: str) -> None:
    shutil.copytree(tiny_v1_bundle, place / "bundle")
    close(place / "bundle" / name)
    assert said(place, "load(place / 'bundle')") == f"{place}/bundle/{name} cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "added_tokens.json"])
def test_a_file_of_a_checkpoint(place: Path, name: str) -> None:
    shutil.copytree(ROOT / "tests/data/golden/tiny-v1/checkpoint", place / "checkpoint")
    (place / "checkpoint").chmod(0o755)
    close(place / "checkpoint" / name)
    message = f"{place}/checkpoint/{name} cannot be read: Permission denied"
    assert said(place, "Checkpoint(place / 'checkpoint')") == message
