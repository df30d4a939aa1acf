"""Plans into a bundle: room made, files put in place, the manifest rewritten."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from export.writer import rewrite_manifest
from runtime.bundle.engines import FOLDER, why_stale
from runtime.bundle.manifest import EngineRecord, FileRecord
from runtime.bundle.reader import Bundle, sha256_of, size_text
from runtime.bundle.targets import TARGETS, Target
from runtime.errors import BundleError

MARGIN = 64 << 20
"""Bytes beyond its weights that a plan may take; for the example models it was up to 7 MB."""


def refuse_existing(bundle: Bundle, names: list[str], plugin_sha256: str | None, overwrite: bool) -> None:
    """Looks for plans of these names, before any work.

    Raises:
        BundleError: one is there, and it is not to be replaced.
    """
    for name in names:
        if overwrite or not bundle.path(name).exists():
            continue
        record = bundle.manifest.engines.get(name)
        if record is None:
            state = "no entry in the manifest"
        else:
            stale = why_stale(name, record, bundle.manifest, plugin_sha256, bundle.folder)
            state = f"stale: {stale.split(': build it again', maxsplit=1)[0]}" if stale else "up to date"
        raise BundleError(f"{bundle.path(name)} exists already ({state}): add --overwrite to build it again")


@contextlib.contextmanager
def staging_folder(bundle: Bundle) -> Iterator[Path]:
    """A hidden folder in ``engines/`` that plans are written in; whatever is left in it goes with it.

    Raises:
        BundleError: the bundle cannot be written.
    """
    engines = bundle.path(FOLDER)
    made = not engines.exists()
    try:
        engines.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=engines))
    except OSError as error:
        raise BundleError(
            f"{engines} cannot be written ({error.strerror}): copy the bundle to where you may write"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                engines.rmdir()


def require_space(folder: Path, size: int) -> None:
    """Checks that plans of ``size`` bytes of weights fit on the disk.

    Raises:
        BundleError: they do not, with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN:
        raise BundleError(
            f"the plans need up to {size_text(size + MARGIN)}, {folder.parent} has {size_text(free)} free: "
            "free some space, or copy the bundle to another disk"
        )


def put_in_place(bundle: Bundle, partial: Mapping[str, Path], records: Mapping[str, EngineRecord]) -> None:
    """Renames finished plans to their names, then rewrites the manifest, so that none is in it before it is there.

    Raises:
        BundleError: the bundle cannot be written, or is no bundle any more.
    """
    try:
        for name, file in partial.items():
            file.chmod(0o644)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            file.replace(bundle.path(name))
        # Of the manifest as it is now: another target may have been built meanwhile.
        rewrite_manifest(
            bundle.folder,
            lambda manifest: replace(manifest, engines=dict(sorted({**manifest.engines, **records}.items()))),
        )
    except OSError as error:
        raise BundleError(f"{bundle.folder} cannot be written: {error.strerror}") from None


def copy_plan(plan: Path, target: Path) -> FileRecord:
    """A plan from elsewhere, copied to ``target``.

    Raises:
        BundleError: it cannot be read or written.
    """
    try:
        shutil.copyfile(plan, target)
    except OSError as error:
        raise BundleError(f"{plan} cannot be copied to {target.parent}: {error.strerror}") from None
    return file_record(target)


def file_record(plan: Path) -> FileRecord:
    """Size and hash of a plan."""
    return FileRecord(plan.stat().st_size, sha256_of(plan))


def plan_version(plan: Path, target: Target) -> str:
    """The version of TensorRT that wrote a plan, from its first bytes, where ``trtexec --getPlanVersionOnly`` looks.

    Raises:
        BundleError: not a plan, or not of this target.
    """
    try:
        with plan.open("rb") as stream:
            head = stream.read(28)
    except OSError as error:
        raise BundleError(f"{plan} cannot be read: {error.strerror}") from None
    if len(head) < 28 or head[:8] != target.tag + bytes(4):
        other = next((known for known in TARGETS.values() if known.tag == head[:4]), None)
        raise BundleError(
            f"{plan} is a plan of {other.title}: name it with --target {other.name}"
            if other is not None and other is not target
            else f"{plan} is not a plan that {target.title} wrote"
        )
    return ".".join(map(str, head[24:28]))
