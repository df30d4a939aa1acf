"""Environments of Python with chosen packages, and what the doctor says in them, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SITE = Path(sysconfig.get_paths()["purelib"])

BASE = ("numpy", "pillow", "PIL", "tokenizers", "tqdm")
"""What monoedge needs, by the beginnings of the names in the folder of packages."""


def checkout(folder: Path) -> Path:
    """Our packages under ``folder``, without what pip writes beside them when it installs a checkout."""
    folder.mkdir(parents=True)
    for name in ("runtime", "plugins_trt", "export", "calibration"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@dataclass
class Report:
    """What one run said, for people and as JSON."""

    code: int
    text: str
    errors: str
    facts: dict[str, Any]

    def finding(self, title: str, what: str) -> dict[str, Any]:
        """The line of a step about something."""
        step = next(step for step in self.facts["steps"] if step["title"] == title)
        (found,) = [finding for finding in step["findings"] if finding["what"] == what]
        return dict(found)

    def said(self, title: str, what: str) -> tuple[str, str, str]:
        """Status, what was found, and the remedy."""
        found = self.finding(title, what)
        return found["status"], found["found"], found["remedy"]


@dataclass
class Machine:
    """An interpreter that sees nothing but the packages that were put into a folder.

    Attributes:
        folder: what everything of it lies in.
        variables: environment variables of its processes.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.packages.mkdir(parents=True)
        checkout(self.folder / "checkout")
        venv.create(self.folder / "venv", with_pip=False, symlinks=True)

    @property
    def python(self) -> Path:
        return self.folder / "venv/bin/python"

    @property
    def packages(self) -> Path:
        return self.folder / "packages"

    def install(self, *names: str) -> None:
        """Puts packages of this environment into it."""
        for name in names:
            found = [
                item for item in SITE.iterdir() if item.name == name or item.name.startswith((f"{name}-", f"{name}."))
            ]
            assert found, name
            for item in found:
                if not (self.packages / item.name).exists():
                    (self.packages / item.name).symlink_to(item)

    def package(self, name: str, version: str, module: str, code: str | None = None, needs: str = "") -> None:
        """Puts a package into it that is only what pip knows of it, and a module if there is code."""
        facts = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        (facts / "top_level.txt").write_text(module.partition(".")[0] + "\n")
        if code is not None:
            place = self.packages.joinpath(*module.split("."))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.with_suffix(".py").write_text(code)

    def doctor(self, *options: str, **variables: str) -> Report:
        """Runs it."""
        file = self.folder / "facts.json"
        file.unlink(missing_ok=True)
        done = self.run(*options, "--json", str(file), **variables)
        facts = json.loads(file.read_text()) if file.exists() else {}
        return Report(done.returncode, done.stdout, done.stderr, facts)

    def run(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{self.folder / 'checkout'}{os.pathsep}{self.packages}",
            "HOME": str(self.folder),
            "MONOEDGE_PLUGIN_LIBRARY": str(self.folder / "no-library.so"),
            **self.variables,
            **variables,
        }
        command = [self.python, "-m", "runtime.doctor", *options]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
