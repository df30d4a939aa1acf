"""Python, the packages that every backend or one on the CPU needs, and free space."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import runtime
from runtime.backends.plugin_library import cache_folder, is_checkout
from runtime.doctor.children import TrialError, attempt
from runtime.doctor.report import ALL, MISSING, NOBODY, OK, ON_ONNXRUNTIME, WRONG, Finding
from runtime.packages import BASE, install_command, requirement

PYTHONS = ((3, 10), (3, 13))
"""The first and the last Python that monoedge runs on, as ``requires-python`` of pyproject.toml says."""

LITTLE_SPACE = 256 << 20
"""Bytes of a folder for temporary files or caches that are too few: caches of engine builds take tens of megabytes."""


def python() -> Iterator[Finding]:
    """Looks at the interpreter, its environment, and where monoedge comes from."""
    named = f"{platform.python_version()}, {sys.executable}"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        yield Finding("Python", OK, named, needed_by=ALL)
    else:
        first, last = (".".join(map(str, pair)) for pair in PYTHONS)
        remedy = f"make an environment with Python {first} to {last}: python{last} -m venv .venv"
        yield Finding("Python", WRONG, f"{named}; expected {first} to {last}", remedy, ALL)
    yield Finding("system", OK, platform.platform())
    yield Finding("environment", OK, _environment())
    place = Path(runtime.__file__).resolve().parents[1]
    if _version("monoedge"):
        yield Finding("monoedge", OK, f"{runtime.__version__}, {'a checkout, ' * is_checkout()}{place}")
    else:
        found = f"{runtime.__version__}, {place}, which is not installed: pip does not know what it needs"
        yield Finding("monoedge", MISSING, found, f"pip install -e {shlex.quote(str(place))}")
    yield _pip()


def _pip() -> Finding:
    """Every remedy that begins with pip means this Python's."""
    own = find_spec("pip")
    if own is None or own.origin is None:
        remedy = "python -m ensurepip --default-pip (on Debian and Ubuntu after: sudo apt install python3-venv)"
        return Finding("pip", MISSING, "this Python has none, and a pip of the shell installs elsewhere", remedy)
    try:
        said = subprocess.run(["pip", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: S607
        found = re.search(r"from (.+) \(python", said)
        place = found[1] if found else said.strip()
    except (OSError, subprocess.SubprocessError):
        place = "none"
    if Path(place).resolve() == Path(own.origin).resolve().parent:
        return Finding("pip", OK, place)
    activate = Path(sys.executable).with_name("activate")
    way = f". {shlex.quote(str(activate))}, or " if activate.exists() else ""
    remedy = f"{way}{shlex.quote(sys.executable)} -m pip in the place of pip"
    return Finding("pip", WRONG, f"the shell's is {place}, which is not this Python's", remedy)


def _environment() -> str:
    if sys.prefix == sys.base_prefix:
        return f"{sys.prefix}, no virtual environment"
    try:
        settings = Path(sys.prefix, "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
    except OSError:
        settings = ""
    sees = re.search(r"^include-system-site-packages *= *true", settings, re.MULTILINE | re.IGNORECASE)
    return f"{sys.prefix}, a virtual environment that sees {'the' if sees else 'none of the'} system's packages"


def packages() -> Iterator[Finding]:
    """Imports the packages that every backend needs, and looks for ONNX Runtime."""
    for module, package in BASE.items():
        yield package_finding(package, module, ALL)
    yield _onnxruntime()


def package_finding(package: str, module: str, needed_by: tuple[str, ...]) -> Finding:
    """Imports a package in a process of its own, and compares its version with the bounds that monoedge has for it."""
    if not _is_there(module):
        return Finding(package, MISSING, "not installed", install_command(package), needed_by)
    try:
        imported = attempt("imported", module=module)
    except TrialError as error:
        remedy = f"{install_command(package)} --force-reinstall"
        return Finding(package, WRONG, f"{_version(package)}: {error}", remedy, needed_by)
    found = _version(package) or imported
    if bounds := _outside(found, requirement(package)):
        return Finding(package, WRONG, f"{found}; expected {bounds}", f"{install_command(package)} -U", needed_by)
    return Finding(package, OK, found, needed_by=needed_by)


def distributions(module: str) -> list[str]:
    """Returns the installed packages that bring a module; several of them lie in one folder."""
    return sorted({name.lower().replace("_", "-") for name in _distributions().get(module, [])})


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _onnxruntime() -> Finding:
    """ONNX Runtime for CPUs and that for GPUs install into one folder, where one overwrites the other."""
    what, needed_by, found = "onnxruntime", ON_ONNXRUNTIME, distributions("onnxruntime")
    if len(found) > 1:
        versions = " and ".join(f"{name} {_version(name)}" for name in found)
        remedy = f"pip uninstall -y {' '.join(found)}, then one of them again: {install_command('onnxruntime')}"
        if "onnxruntime-gpu" in found:
            remedy += f", or for its backends on a GPU {install_command('onnxruntime-gpu')}"
        return Finding(what, WRONG, f"{versions} share one folder, where each overwrites the other", remedy, needed_by)
    return package_finding(next(iter(found), what), what, needed_by)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is half there
        return False


def _version(package: str) -> str:
    try:
        return str(version(package))
    except PackageNotFoundError:
        return ""


def _outside(found: str, wanted: str) -> str:
    """Returns the bounds that a version does not keep; empty where it keeps them."""
    bounds = re.findall(r"(>=|==|<)\s*([\d.]+)", wanted)
    here = numbers(found)
    keeps = {">=": lambda bound: here >= bound, "<": lambda bound: here < bound, "==": lambda bound: here == bound}
    broken = here and not all(keeps[sign](numbers(bound)) for sign, bound in bounds)
    return ",".join(f"{sign}{bound}" for sign, bound in bounds) if broken else ""


def numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version, as far as it has no letters."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def disk(bundle: Path | None) -> Iterator[Finding]:
    """Looks for space where monoedge writes."""
    places = {"caches": cache_folder(), "temporary files": Path(tempfile.gettempdir())}
    for what, folder in places.items():
        yield _space(what, folder, LITTLE_SPACE, "free some space, or set " + _VARIABLES[what])
    if bundle is not None:
        yield _space("bundle", bundle, 0, "")


_VARIABLES = {"caches": "XDG_CACHE_HOME", "temporary files": "TMPDIR"}


def _space(what: str, folder: Path, least: int, remedy: str) -> Finding:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / 1e9:.1f} GB free"
    if not os.access(there, os.W_OK):
        if least:
            return Finding(what, WRONG, f"{found}, but it cannot be written to", remedy)
        found += ", read only: engines are built in a copy"
    return Finding(what, WRONG, found, remedy, NOBODY) if free < least else Finding(what, OK, found)
