"""Opens bundles, and checks their files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from runtime.bundle.embeddings import Embeddings
from runtime.bundle.manifest import EMBEDDINGS, MANIFEST, PRECISIONS, FileRecord, Manifest
from runtime.errors import BundleError
from runtime.records import find, is_folder, read_text, require_file, user_path

Progress = Callable[[int], object]
"""Called with the number of bytes just read."""

_REMEDY = "copy the bundle again, or export it again"


class Bundle:
    """An opened bundle, its files present with the sizes that the manifest gives.

    Args:
        folder: the bundle.
        verify: compare the SHA-256 of every file too, which reads all of it.
        progress: called with the number of bytes just hashed.

    Raises:
        BundleError: no bundle, or one that this runtime does not understand, or a file missing or altered.
    """

    def __init__(
        self,
        folder: str | Path,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.folder = user_path(folder)
        if not is_folder(self.folder):
            raise BundleError(
                f"{self.folder}: no such bundle; make one with: python -m export.onnx --ckpt CKPT -o {self.folder}"
            )
        if find(self.folder / MANIFEST) is None:
            raise BundleError(f"{self.folder} is not a bundle: it has no {MANIFEST}")
        try:
            self.manifest = Manifest.from_json(read_text(self.folder / MANIFEST))
        except BundleError as error:
            raise BundleError(f"{self.folder}: {error}") from None
        for name, record in self.manifest.files.items():
            self._check_file(name, record, verify, progress)

    def path(self, name: str) -> Path:
        """Returns the path of a file that the manifest lists."""
        return self.folder / name

    @property
    def length_limit(self) -> str:
        """Why a conversation can be no longer where the bundle sets the limit, for people."""
        return f"the bundle was exported with --max-length {self.manifest.model.max_length}"

    def embeddings(self) -> Embeddings:
        """Opens the token embeddings, [vocab, hidden] in ``PRECISIONS[precision]``."""
        model = self.manifest.model
        shape = (model.vocab_size, model.hidden_size)
        return Embeddings(self.path(EMBEDDINGS), shape, PRECISIONS[self.manifest.precision])

    def _check_file(self, name: str, record: FileRecord, verify: bool, progress: Progress | None) -> None:
        file = self.folder / name
        if not file.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{file} leads outside the bundle: do not trust this bundle")
        size = require_file(file, remedy=f": {_REMEDY}").st_size
        if size != record.size:
            raise BundleError(f"{file} has {size:,} bytes, {MANIFEST} says {record.size:,}: {_REMEDY}")
        if verify and sha256_of(file, progress) != record.sha256:
            raise BundleError(f"{file} was altered, its SHA-256 is not that of {MANIFEST}: {_REMEDY}")


def size_text(size: int) -> str:
    """Returns a number of bytes for people, in powers of ten as disks are sold: ``2.7 MB``, ``13.61 GB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def sha256_of(file: Path, progress: Progress | None = None) -> str:
    """Returns the SHA-256 of a file, in hexadecimal.

    Raises:
        BundleError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                if progress is not None:
                    progress(len(block))
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
