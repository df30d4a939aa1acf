"""Writes a bundle so that nothing half-written ever looks like one.

Files go into a hidden folder beside the target; the manifest comes last, and one step puts the whole in place.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from runtime.bundle.manifest import FORMAT, MANIFEST, FileRecord, Manifest
from runtime.bundle.reader import Bundle, size_text
from runtime.console.files import alone, put_in_place, recover, replaced, require_place, work_folder
from runtime.errors import BundleError
from runtime.records import find, is_folder, read_text, user_path


class HashingFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: Path) -> None:
        self._file: BinaryIO = file.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes; an array is written as the bytes it holds."""
        self._file.write(data)
        self._digest.update(data)
        self.size += memoryview(data).nbytes

    def pad_to(self, alignment: int) -> None:
        """Appends zeros up to the next multiple of ``alignment``."""
        self.write(bytes(-self.size % alignment))

    def record(self) -> FileRecord:
        """Returns size and hash of what was written."""
        return FileRecord(self.size, self._digest.hexdigest())

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()


class BundleWriter:
    """Collects the files of a bundle. A context manager: where it ends without ``commit``, it leaves nothing.

    Args:
        target: the folder to make.
        overwrite: replace a bundle that is there already.

    Raises:
        BundleError: the target exists, or is no bundle and so not ours to replace; or it cannot be made.
    """

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        find(user_path(target))  # refuses what is no path, or leads in a circle
        self.target = user_path(target).resolve()
        recover(self.target)
        self._is_ours = _is_bundle if overwrite else _is_nothing
        if find(self.target) is not None and not self._is_ours(self.target):
            raise BundleError(
                f"{target} is not a bundle, so --overwrite leaves it alone: choose another folder"
                if overwrite
                else f"{target} exists already: choose another folder, or add --overwrite"
            )
        try:
            require_place(self.target)
        except OSError as error:
            raise BundleError(f"{self.target} cannot be made: {error.strerror}") from None
        self._records: dict[str, FileRecord] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BundleWriter:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.folder = self._stack.enter_context(work_folder(self.target)) / "new"
            self.folder.mkdir()
        except OSError as error:
            self._stack.close()
            raise BundleError(f"{self.target} cannot be made: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if isinstance(error, OSError):
            raise BundleError(f"writing {self.target} failed: {error.strerror or error}; nothing was kept") from None

    @contextmanager
    def open(self, name: str) -> Iterator[HashingFile]:
        """Gives a new file of the bundle, which is closed and taken into the manifest at the end."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        with closing(HashingFile(self.folder / name)) as file:
            yield file
        self._records[name] = file.record()

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file at once."""
        with self.open(name) as file:
            file.write(data)

    def copy(self, name: str, source: Bundle) -> None:
        """Copies a file of another bundle, as its manifest records it.

        Never as a hard link, though nobody writes into a bundle's files: ``onnx.load`` refuses weights that have two.
        """
        target = self.folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path(name), target)
        source.require_same(name)
        self._records[name] = source.manifest.files[name]

    def draft(self, manifest: Manifest) -> Bundle:
        """Opens the files collected so far as a bundle, to run it before it is in place."""
        self._write_manifest(manifest)
        try:
            return Bundle(self.folder)
        finally:
            # Should this process be killed, what it leaves is no bundle.
            (self.folder / MANIFEST).unlink()

    def commit(self, manifest: Manifest) -> Manifest:
        """Puts the bundle in place; returns the manifest as it was written, with all files."""
        written = self._write_manifest(manifest)
        try:
            put_in_place(self.folder, self.target, self._is_ours)
        except FileExistsError:
            raise BundleError(
                f"{self.target} appeared meanwhile and stays as it is; nothing was kept: choose another folder"
            ) from None
        return written

    def _write_manifest(self, manifest: Manifest) -> Manifest:
        written = replace(manifest, files={name: self._records[name] for name in sorted(self._records)})
        (self.folder / MANIFEST).write_text(written.to_json(), encoding="utf-8")
        return written


def require_space(target: Path, size: int) -> None:
    """Checks that the ``size`` bytes of a bundle fit on the disk where it is to be, before any work.

    Raises:
        BundleError: they do not, with both numbers.
    """
    folder = next(parent for parent in user_path(target).absolute().parents if is_folder(parent))
    free = shutil.disk_usage(folder).free
    if free < size:
        room = f"{folder} has {size_text(free)} free"
        raise BundleError(f"the bundle needs {size_text(size)}, {room}: free some, or choose another disk with -o")


def _is_bundle(path: Path) -> bool:
    """Whether a path is a bundle, which may be damaged or of another version, or an empty folder."""
    if path.is_symlink() or not is_folder(path):
        return False
    if find(path / MANIFEST) is None:
        return not any(path.iterdir())
    return f'"{FORMAT}"' in read_text(path / MANIFEST)


def _is_nothing(path: Path) -> bool:
    return False


def rewrite_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Replaces the manifest of a bundle that is in place by what ``change`` makes of it as it is now.

    Raises:
        BundleError: it is no manifest any more.
        OSError: it cannot be written.
    """
    path = folder / MANIFEST
    with alone(folder), replaced(path) as beside:
        manifest = change(Manifest.from_json(read_text(path)))
        beside.write_text(manifest.to_json(), encoding="utf-8")
