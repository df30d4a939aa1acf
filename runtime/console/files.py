"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import MonoedgeError, OptionError


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
    folder: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        folder.chmod(0o755)
        yield folder
        folder.rename(target)
    except OSError as error:
        raise MonoedgeError(f"writing {target} failed: {error.strerror or error}; nothing was kept") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
