"""Opens bundles, and checks their files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from runtime.bundle import manifest
from runtime.bundle.embeddings import Embeddings
from runtime.errors import BundleError
from runtime.records import find, read_bytes, read_text, require_file, user_path, why_no_bundle

Progress = Callable[[int], object]
"""Called with the number of bytes just read."""

_ATTEMPTS = 10

_LOCATION = re.compile(rb"\n\x08location\x12(.)", re.DOTALL)
"""In an ONNX file, what stands before the name of a file of weights; the last byte is the name's length."""

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

    def __init__(self, folder: str | Path, verify: bool = False, progress: Progress | None = None) -> None:
        self.folder = user_path(folder)
        find(self.folder)  # raises where that is not to be known
        for _ in range(_ATTEMPTS):
            self._seen: dict[str, tuple[int, ...]] = {}
            before = find(self.folder / manifest.MANIFEST)
            if before is None:
                raise BundleError(why_no_bundle(self.folder, manifest.MANIFEST))
            problem = None
            try:
                self._read(verify, progress)
            except BundleError as error:
                problem = error
            # A bundle that was replaced in the midst is read again: the files of two may fit in size. The last number
            # tells a new file from one that has gone, whose inode and time it may have.
            now = find(self.folder / manifest.MANIFEST)
            if now is not None and (*_identity(now), now.st_ctime_ns) == (*_identity(before), before.st_ctime_ns):
                if problem is not None:
                    raise problem
                return
        raise BundleError(f"{self.folder} is replaced faster than it can be read: wait for what writes it")

    def _read(self, verify: bool, progress: Progress | None) -> None:
        text = read_text(self.folder / manifest.MANIFEST)
        try:
            self.manifest = manifest.Manifest.from_json(text)
        except BundleError as error:
            raise BundleError(f"{self.folder}: {error}") from None
        for name, record in self.manifest.files.items():
            self._check_file(name, record, verify, progress)
        for name, engine in self.manifest.engines.items():
            if (found := find(self.path(name))) is not None:  # a bundle can answer without
                self._seen[name] = _identity(found)
                if verify:
                    self._check_file(name, engine, verify, progress)

    def path(self, name: str) -> Path:
        """Returns the path of a file that the manifest lists."""
        return self.folder / name

    @property
    def length_limit(self) -> str:
        """Why a conversation can be no longer where the bundle sets the limit, for people."""
        return f"the bundle was exported with --max-length {self.manifest.model.max_length}"

    def require_same(self, *names: str) -> None:
        """Checks that files are still those that were there when the bundle was opened; others are not looked at.

        Raises:
            BundleError: one was replaced or written to.
        """
        for name in self._seen.keys() & set(names):
            found = find(self.path(name))
            if found is None or _identity(found) != self._seen[name]:
                raise BundleError(f"{self.folder} was replaced while it was in use ({name} is another): load it again")

    def embeddings(self) -> Embeddings:
        """Opens the token embeddings, [vocab, hidden] in ``manifest.PRECISIONS[precision]``.

        Raises:
            BundleError: they cannot be read, or one of the files that a model reads whole was replaced meanwhile.
        """
        model = self.manifest.model
        shape = (model.vocab_size, model.hidden_size)
        opened = Embeddings(self.path(manifest.EMBEDDINGS), shape, manifest.PRECISIONS[self.manifest.precision])
        self.require_same(manifest.EMBEDDINGS, manifest.TOKENIZER, manifest.CHAT_TEMPLATE)
        return opened

    def _check_file(self, name: str, record: manifest.FileRecord, verify: bool, progress: Progress | None) -> None:
        file = self.folder / name
        found = require_file(file, remedy=f": {_REMEDY}")
        self._seen[name], size = _identity(found), found.st_size
        if size != record.size:
            raise BundleError(f"{file} has {size:,} bytes, {manifest.MANIFEST} says {record.size:,}: {_REMEDY}")
        if name in (manifest.VISION_GRAPH, manifest.DECODER_GRAPH, manifest.VISUAL_DECODER_GRAPH):
            data = read_bytes(file)
            for place in _LOCATION.finditer(data):
                named = data[place.end() : place.end() + place[1][0]].decode(errors="replace")
                if named not in self.manifest.files:
                    raise BundleError(
                        f"{file} takes weights from {named!r}, which {manifest.MANIFEST} does not list: {_REMEDY}"
                    )
        if verify and sha256_of(file, progress) != record.sha256:
            raise BundleError(f"{file} was altered, its SHA-256 is not that of {manifest.MANIFEST}: {_REMEDY}")


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """Returns what tells a file from another that takes its name."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


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
