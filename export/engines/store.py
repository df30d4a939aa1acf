"""Plans written into a bundle: the disk checked, files put in place, the manifest rewritten."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from export.engines.options import Options
from export.writer import rewrite_manifest
from runtime.backends.tensorrt.runtime_cache import SUFFIX
from runtime.bundle.engines import FOLDER, why_stale
from runtime.bundle.manifest import EngineRecord
from runtime.bundle.reader import Bundle, size_text
from runtime.bundle.targets import TARGETS, Target
from runtime.console.files import flush, work_folder
from runtime.errors import BundleError
from runtime.records import find

MARGIN = 64 << 20
"""Bytes beyond its weights that a plan may take; for the example models it was up to 7 MB."""

Staged = Mapping[str, tuple[Path, EngineRecord]]
"""Finished plans by their names in the bundle: the file as it lies now, and what the manifest will say of it."""


def refuse_existing(bundle: Bundle, names: list[str], options: Options) -> None:
    """Looks for plans of these names, before any work.

    Raises:
        BundleError: one exists, and is not to be replaced.
    """
    for name in names:
        if options.overwrite or find(bundle.path(name)) is None:
            continue
        record = bundle.manifest.engines.get(name)
        if record is None:
            state = "no entry in the manifest"
        else:
            stale = why_stale(name, record, bundle.manifest, options.plugin_sha256, bundle.folder)
            state = f"stale: {stale.split(': build it again', maxsplit=1)[0]}" if stale else "up to date"
        raise BundleError(f"{bundle.path(name)} exists already ({state}): add --overwrite to build it again")


@contextlib.contextmanager
def staging_folder(bundle: Bundle, size: int) -> Iterator[Path]:
    """Gives a hidden folder in ``engines/`` to write plans in; it is deleted at the end, with what is left in it.

    It is made before the build, so that a bundle that cannot be written is refused before hours of work. The plans
    hold ``size`` bytes of weights.

    Raises:
        BundleError: the bundle cannot be written, or the disk has no room for plans of that size.
    """
    engines = bundle.path(FOLDER)
    existed = engines.exists()
    stack = contextlib.ExitStack()
    try:
        engines.mkdir(exist_ok=True)
        folder = stack.enter_context(work_folder(engines / "plans"))
    except OSError as error:
        raise BundleError(f"{engines} cannot be written ({error.strerror}): copy the bundle elsewhere") from None
    try:
        with stack:
            free = shutil.disk_usage(engines).free
            if free < size + MARGIN:
                raise BundleError(
                    f"the plans need up to {size_text(size + MARGIN)}, {engines} has {size_text(free)} free: "
                    "free some space, or copy the bundle to another disk"
                )
            yield folder
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                engines.rmdir()


def put_in_place(bundle: Bundle, staged: Staged) -> None:
    """Renames plans to their names, then rewrites the manifest, so that none is in it before it is there.

    Raises:
        BundleError: the bundle cannot be written, or is no bundle any more.
    """
    try:
        for name, (file, _) in staged.items():
            if file == bundle.path(name):
                continue
            flush(file)
            file.replace(bundle.path(name))
            if find(cache := file.with_suffix(SUFFIX)) is not None:  # what TensorRT compiled when the plan was tried
                cache.replace(bundle.path(name).with_suffix(SUFFIX))
        flush(bundle.path(FOLDER))
        records = {name: record for name, (_, record) in staged.items()}
        # Of the manifest as it is now: another target may have been built meanwhile.
        rewrite_manifest(
            bundle.folder,
            lambda manifest: replace(manifest, engines=dict(sorted({**manifest.engines, **records}.items()))),
        )
    except OSError as error:
        raise BundleError(f"{bundle.folder} cannot be written: {error.strerror}") from None


def plan_version(plan: Path, target: Target) -> str:
    """Reads which TensorRT wrote a plan from its first bytes, as ``trtexec --getPlanVersionOnly`` does.

    Raises:
        BundleError: it is no plan, or one of another TensorRT.
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
