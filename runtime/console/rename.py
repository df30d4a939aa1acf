"""Renames folders without ever taking what stands in the way: in one step where the system can."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_NOREPLACE, _EXCHANGE = 1, 2
"""Flags of Linux's ``renameat2``, from ``<linux/fs.h>``."""

_AT_FDCWD = -100

OLD = "old"
"""In a hidden folder, what stood in the target's place, where file systems cannot exchange two folders in one step."""

_RENAMEAT2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def rename_free(old: Path, new: Path) -> None:
    """Renames a folder to a name that must be free.

    Raises:
        FileExistsError: it is not.
    """
    if not _renameat2(old, new, _NOREPLACE):
        old.stat()
        new.mkdir()
        try:
            old.rename(new)  # over the empty folder, in one step
        except OSError:
            with contextlib.suppress(OSError):
                new.rmdir()
            raise


def exchange(made: Path, target: Path) -> None:
    """Exchanges two folders: in one step where the system can, so that the target's name is never empty."""
    if not _renameat2(made, target, _EXCHANGE):
        old = made.with_name(OLD)
        target.rename(old)
        try:
            made.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(made)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Renames with a flag; false where the system or the file system does not know it."""
    if _RENAMEAT2 is None:
        return False
    if _RENAMEAT2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))
