"""Reads small files that anyone may have made: text, JSON and the records in it, strictly."""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import BundleError, MonoedgeError

T = TypeVar("T")

LARGEST = 256 << 20
"""Bytes of a file that is read as a whole. The largest, a tokenizer, has some 10 MB."""


def user_path(text: str | Path) -> Path:
    """Makes a path of what a user wrote; ``~name`` of a user who is not there stays a name like any other.

    Raises:
        BundleError: neither a str nor a Path, as only a bundle can come here from an app.
    """
    if not isinstance(text, (str, os.PathLike)):
        raise BundleError(f"expected a bundle's folder as a str or Path, got {text!r:.200}")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - that of Path raises RuntimeError


def find(path: Path, error: type[MonoedgeError] = BundleError) -> os.stat_result | None:
    """Returns what a path leads to, links followed; None where nothing is.

    Raises:
        MonoedgeError: as ``error``: that cannot be known, as below a folder that may not be read; or it is no path.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {getattr(reason, 'strerror', reason)}") from None


def is_folder(path: Path, error: type[MonoedgeError] = BundleError) -> bool:
    """Whether a folder is there; raises as ``find`` does."""
    found = find(path, error)
    return found is not None and stat.S_ISDIR(found.st_mode)


def why_no_bundle(path: Path, manifest: str) -> str:
    """Returns what a path leads to where a bundle's folder is expected, and what to do.

    Args:
        path: a folder without ``manifest``, or something else.
        manifest: the name of a bundle's manifest.
    """
    export, found = "python -m export.onnx --ckpt", find(path)
    if found is None and not path.is_absolute() and len(path.parts) == 2 and find(path.parent) is None:
        return f"{path}: no such bundle; if it is a checkpoint of the hub, make one with: {export} {path} -o BUNDLE"
    if found is None:
        return f"{path}: no such bundle; make one with: {export} CKPT -o {shlex.quote(str(path))}"
    if find(path.parent / manifest) is not None:
        return f"{path} is a part of a bundle: name its folder, {path.parent}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is a file: expected a bundle's folder, which {export} CKPT -o BUNDLE makes"
    if find(path / "config.json") is not None:
        return f"{path} is a checkpoint: make a bundle of it with: {export} {shlex.quote(str(path))} -o BUNDLE"
    return f"{path} is not a bundle: it has no {manifest}"


def require_file(path: Path, error: type[MonoedgeError] = BundleError, remedy: str = "") -> os.stat_result:
    """Checks that a file may be read: a regular one, since a pipe or a device would make its reader wait for ever.

    Raises:
        MonoedgeError: as ``error``: it is missing, something else, or may not be read; with ``remedy`` behind it.
    """
    found = find(path, error)
    if found is None:
        raise error(f"{path} is missing{remedy}")
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a file{remedy}")
    try:
        path.open("rb").close()
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}") from None
    return found


def read_bytes(path: Path, error: type[MonoedgeError] = BundleError, remedy: str = "") -> bytes:
    """Reads a whole file; raises as ``require_file`` does, and where it is too large."""
    if require_file(path, error, remedy).st_size > LARGEST:
        raise error(f"{path} has more than {LARGEST:,} bytes{remedy}")
    try:
        return path.read_bytes()
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}{remedy}") from None


def read_text(path: Path, error: type[MonoedgeError] = BundleError, remedy: str = "") -> str:
    """Reads a file of UTF-8 without its byte order mark; raises as ``read_bytes`` does, and where it is none."""
    try:
        return read_bytes(path, error, remedy).decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} cannot be read: {reason}{remedy}") from None


def parse_json(text: str, what: object, error: type[MonoedgeError] = BundleError, remedy: str = "") -> Any:  # noqa: ANN401
    """Parses JSON, and nothing beside it: no NaN, no infinite number, no key twice, no half characters.

    Raises:
        MonoedgeError: as ``error``, that begins with ``what`` and ends with ``remedy``: it is none.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except (ValueError, RecursionError) as reason:
        raise error(f"{what} is not valid JSON ({reason}){remedy}") from None


def read_json(path: Path, error: type[MonoedgeError] = BundleError, remedy: str = "") -> Any:  # noqa: ANN401
    """Reads a JSON file; raises as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path, error, remedy), path, error, remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no finite number")
    return value


def read_record(kind: type[T], data: object, what: str) -> T:
    """Makes a dataclass of a JSON object whose keys are exactly its fields; those with a default may be missing.

    Args:
        kind: the dataclass, which checks its values itself.
        data: the JSON object; its lists become tuples.
        what: the record's name in errors.

    Raises:
        BundleError: not an object, or one with other keys.
    """
    known = fields(kind)  # type: ignore[arg-type] # dataclasses have no common base
    names = {field.name for field in known}
    needed = {field.name for field in known if field.default is MISSING}
    if not isinstance(data, Mapping) or not needed <= set(data) <= names:
        got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise BundleError(f"{what}: expected the keys {sorted(names)}, got {got}: export the bundle again")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return kind(**values)
