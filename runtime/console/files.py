"""Files and folders that are there whole or not at all.

What is made lies in a hidden folder beside its target until it is whole and on the disk. That folder holds a file
that its run keeps locked. Where nobody has locked it, its run was killed: the next run to the same target takes the
folder away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.console.rename import OLD, exchange, rename_free
from runtime.errors import MonoedgeError, OptionError
from runtime.records import user_path

_LOCK = "lock"
"""In a hidden folder, the file that its run holds locked."""


def recover(target: Path) -> None:
    """Takes away what killed runs left beside a target; what one had moved out of its place comes back."""
    with contextlib.suppress(OSError):  # of a parent that is not there
        for folder in target.parent.iterdir():
            if folder.name.startswith(_prefix(target)):
                # Another's, in use, or gone by now.
                with contextlib.suppress(OSError), _locked(folder / _LOCK, os.O_RDWR):
                    with contextlib.suppress(OSError):
                        rename_free(folder / OLD, target)
                    _remove(folder)
                # A run that is killed before it has a lock, or after, leaves an empty one.
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Gives a hidden folder beside a target, to make it in. It goes at the end, with what is left in it.

    Raises:
        OSError: it cannot be made.
    """
    recover(target)
    with contextlib.ExitStack() as stack:
        while True:
            folder = target.with_name(f"{_prefix(target)}{uuid.uuid4().hex[:8]}")
            # By mkdir, with the permissions that the user's umask leaves, as all that is put in place.
            folder.mkdir()
            # Until it is locked, another run may take it for a leftover.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(_locked(folder / _LOCK, os.O_RDWR | os.O_CREAT, wait=True))
                break
        try:
            yield folder
        finally:
            _remove(folder)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a hidden path; what is written there, a file or a folder, takes the place of another at the end.

    Whatever fails leaves nothing of it, and what stood there stays. A folder that is not empty is not replaced.

    Raises:
        OSError: it cannot be put in place.
    """
    with work_folder(path) as folder:
        yield folder / "new"
        _flush_all(folder / "new")
        (folder / "new").replace(path)
        flush(path.parent)


def require_output(target: Path, option: str) -> None:
    """Checks, before any work, that ``replaced`` could put a file in place.

    Args:
        target: the file.
        option: what named it, for the message.

    Raises:
        OptionError: it is a folder, or its folder is not there or cannot be written to.
    """
    if not target.parent.is_dir():
        raise OptionError(f"{option}: {target.parent} is not a folder: make it, or choose another")
    if target.is_dir():
        raise OptionError(f"{option}: {target} is a folder, expected the file to write")
    try:
        with work_folder(target):
            pass
    except OSError as error:
        raise OptionError(f"{option}: {target} cannot be written: {error.strerror}") from None


def require_new(target: Path) -> Path:
    """Checks, before any work, that ``new_folder`` could make a folder; returns its absolute path.

    Raises:
        OptionError: the target exists.
        MonoedgeError: it cannot be written.
    """
    target = user_path(target).absolute()
    recover(target)
    if os.path.lexists(target):
        raise _exists(target)
    try:
        require_place(target)
    except OSError as error:
        raise MonoedgeError(f"{target} cannot be made: {error.strerror}") from None
    return target


def require_place(target: Path) -> None:
    """Checks that something can be made where a folder is to be: in the first of its parents that is there.

    Raises:
        OSError: it cannot.
    """
    with work_folder(next(parent for parent in target.parents if parent.exists()) / target.name):
        pass


def _exists(target: Path) -> OptionError:
    return OptionError(f"{target} exists already: choose another folder, or delete it first")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Gives a hidden folder beside the target, which becomes it at the end; whatever fails leaves nothing.

    Raises:
        OptionError: the target exists.
        MonoedgeError: it cannot be written.
    """
    target = require_new(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(target) as folder:
            (folder / "new").mkdir()
            yield folder / "new"
            put_in_place(folder / "new", target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        raise MonoedgeError(f"writing {target} failed: {error.strerror or error}; nothing was kept") from None


def put_in_place(made: Path, target: Path, is_ours: Callable[[Path], bool] = lambda path: False) -> None:
    """Brings a folder of a ``work_folder`` to the disk and gives it its name. What it replaces lies at ``made`` then.

    Args:
        made: the folder.
        target: its name.
        is_ours: whether a path is something to replace; by default nothing is.

    Raises:
        FileExistsError: what stands there is not to be replaced, and stays.
        OSError: it cannot be put in place; what stood there stays.
    """
    _flush_all(made)
    while True:
        try:
            rename_free(made, target)
            break
        except FileExistsError:
            if not is_ours(target):
                raise
        with contextlib.suppress(FileNotFoundError):  # gone by now
            exchange(made, target)
            if is_ours(made):
                break
            exchange(made, target)  # another came in between
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    flush(target.parent)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time in; the others wait. Where a file system cannot lock folders, all come in."""
    with _locked(folder, os.O_RDONLY, wait=True):
        yield


def flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk.

    Raises:
        OSError: that failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove(folder: Path) -> None:
    """Deletes a work folder, its lock last."""
    with contextlib.suppress(OSError):
        for item in folder.iterdir():
            if item.name != _LOCK:
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        shutil.rmtree(folder)


@contextmanager
def _locked(path: Path, flags: int, wait: bool = False) -> Iterator[None]:
    """Opens and locks a file.

    Raises:
        BlockingIOError: another has the lock, and this is not to wait.
        FileNotFoundError: there is no such file, or not any more.
        OSError: the file system has no locks, and this is not to wait.
    """
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        path.stat()
        yield
    finally:
        os.close(descriptor)


def _flush_all(path: Path) -> None:
    """Brings a file, or a folder with all that is in it, to the disk."""
    if path.is_dir() and not path.is_symlink():
        for item in path.iterdir():
            _flush_all(item)
    if not path.is_symlink():
        flush(path)
