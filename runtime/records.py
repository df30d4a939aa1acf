"""Reads small records of a bundle's JSON files, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from runtime.errors import BundleError

T = TypeVar("T")


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
