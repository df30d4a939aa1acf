"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import MonoedgeError, OptionError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a hidden path beside another; what is written there, a file or a folder, takes its place at the end.

    Whatever fails leaves nothing of it, and what stood there stays. A folder that is not empty is not replaced.

    Raises:
        OSError: it cannot be put in place.
    """
    beside = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        beside.replace(path)
    finally:
        if beside.is_dir() and not beside.is_symlink():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a hidden folder beside the target, which becomes it at the end; whatever fails leaves nothing.

    Raises:
        OptionError: the target exists.
        MonoedgeError: it cannot be written.
    """
    target = target.expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise OptionError(f"{target} exists already: choose another folder, or delete it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as folder:
            folder.mkdir()
            yield folder
    except OSError as error:
        raise MonoedgeError(f"writing {target} failed: {error.strerror or error}; nothing was kept") from None
