"""Writes a bundle so that nothing half-written ever looks like one.

Files go into a hidden folder beside the target; the manifest comes last, and a rename puts the whole in place.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from runtime.bundle.manifest import MANIFEST, FileRecord, Manifest
from runtime.bundle.reader import Bundle, size_text
from runtime.console.files import replaced
from runtime.errors import BundleError


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
        BundleError: the target exists, or is no bundle and so not ours to replace.
    """

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        self.target = target.expanduser().resolve()
        if self.target.exists():
            if not overwrite:
                raise BundleError(f"{target} exists already: choose another folder, or add --overwrite")
            if not self.target.is_dir() or (any(self.target.iterdir()) and not (self.target / MANIFEST).is_file()):
                raise BundleError(f"{target} is not a bundle, so --overwrite leaves it alone: choose another folder")
        self._records: dict[str, FileRecord] = {}

    def __enter__(self) -> BundleWriter:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{self.target.name}.partial-"
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.target.parent))
            self.folder.chmod(0o755)
        except OSError as error:
            raise BundleError(f"{self.target} cannot be made: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise BundleError(f"writing {self.target} failed: {error.strerror or error}; nothing was kept") from None

    def require_space(self, size: int) -> None:
        """Checks that ``size`` bytes fit on the disk, before any work.

        Raises:
            BundleError: they do not, with both numbers.
        """
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise BundleError(
                f"the bundle needs {size_text(size)}, {self.target.parent} has {size_text(free)} free: "
                "free some space, or choose another disk with -o"
            )

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
        if not self.target.exists():
            self.folder.rename(self.target)
            return written
        old = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.old-", dir=self.target.parent))
        self.target.replace(old)
        try:
            self.folder.rename(self.target)
        except OSError:
            old.replace(self.target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return written

    def _write_manifest(self, manifest: Manifest) -> Manifest:
        written = replace(manifest, files={name: self._records[name] for name in sorted(self._records)})
        (self.folder / MANIFEST).write_text(written.to_json(), encoding="utf-8")
        return written


def rewrite_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Replaces the manifest of a bundle that is in place by what ``change`` makes of it as it is now.

    Raises:
        BundleError: it is no manifest any more.
        OSError: it cannot be written.
    """
    path = folder / MANIFEST
    manifest = change(Manifest.from_json(path.read_text(encoding="utf-8")))
    with replaced(path) as beside:
        beside.write_text(manifest.to_json(), encoding="utf-8")
