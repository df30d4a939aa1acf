"""The commands and snippets of README and docs, run as they stand.

Every ``bash`` and ``python`` block runs, in the order of its page, in a folder that looks like the checkout. A ``text``
block right behind one is what it prints. A block that cannot run here carries the reason, as an HTML comment in the
line before it that begins with ``not run here:``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]

_BLOCK = re.compile(
    r"^(?:<!-- not run here: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass
class Block:
    language: str
    text: str
    line: int
    reason: str | None
    output: str | None = None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    text = page.read_text()
    end = 0
    for match in _BLOCK.finditer(text):
        if match["language"] == "text" and found and not text[end : match.start()].strip():
            found[-1].output = match["text"]
        else:
            line = text[: match.start()].count("\n") + 1
            found.append(Block(match["language"], match["text"], line, match["reason"]))
        end = match.end()
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with everything of the checkout in it, where what snippets write stays apart."""
    for item in ROOT.iterdir():
        if item.name not in {"build", ".git", ".venv"}:
            (tmp_path / item.name).symlink_to(item)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, checkout: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    for block in blocks(page):
        if block.reason is not None or block.language not in {"bash", "python"}:
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        result = subprocess.run(
            [*command, block.text],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, f"{page.name}:{block.line}\n{result.stderr}"
        if block.output is not None:
            assert result.stdout == block.output, f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\":#]+)\"", page.read_text()):
        link = target[0] or target[1]
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_reason_is_found() -> None:
    """The parser sees what the other tests rely on."""
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(block.language == "python" and block.reason is None for block in found) >= 3
    assert sum(block.language == "bash" and block.reason is None for block in found) >= 3
    assert all(block.language for block in found)
