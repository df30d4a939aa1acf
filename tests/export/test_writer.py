"""Bundles put in place: nothing of others is replaced, and none is ever half there."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import runtime
from export.writer import BundleWriter, rewrite_manifest
from runtime.bundle.manifest import MANIFEST
from runtime.bundle.reader import Bundle


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def fill(writer: BundleWriter, source: Bundle) -> None:
    for name in source.manifest.files:
        writer.copy(name, source)


def test_of_two_exports_to_one_folder_one_is_told(tiny_v1_bundle: Path, tmp_path: Path) -> None:
    source = Bundle(tiny_v1_bundle)
    target = tmp_path / "bundle"
    with BundleWriter(target) as first, BundleWriter(target) as second:
        for writer in (first, second):
            fill(writer, source)
        first.commit(source.manifest)
        before = target.stat().st_ino
        with pytest.raises(runtime.BundleError, match="appeared meanwhile and stays as it is"):
            second.commit(source.manifest)
    assert target.stat().st_ino == before
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_during_the_export_stays(overwrite: bool, tiny_v1_bundle: Path, tmp_path: Path) -> None:
    source = Bundle(tiny_v1_bundle)
    with BundleWriter(tmp_path / "bundle", overwrite) as writer:
        fill(writer, source)
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle/photo.jpg").write_bytes(b"dear")
        with pytest.raises(runtime.BundleError, match="appeared meanwhile"):
            writer.commit(source.manifest)
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == ["photo.jpg"]


def test_overwrite_spares_the_manifest_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST).write_text('{"name": "a web app"}')
    with pytest.raises(runtime.BundleError, match="is not a bundle"):
        BundleWriter(tmp_path / "site", overwrite=True)


def test_overwrite_replaces_a_damaged_bundle_and_an_empty_folder(tiny_v1_bundle: Path, tmp_path: Path) -> None:
    source = Bundle(tiny_v1_bundle)
    shutil.copytree(tiny_v1_bundle, tmp_path / "damaged")
    (tmp_path / "damaged/decoder.weights").unlink()
    (tmp_path / "empty").mkdir()
    for name in ("damaged", "empty"):
        with BundleWriter(tmp_path / name, overwrite=True) as writer:
            fill(writer, source)
            writer.commit(source.manifest)
        assert Bundle(tmp_path / name, verify=True).manifest == source.manifest
    assert names(tmp_path) == ["damaged", "empty"]


def test_two_that_rewrite_a_manifest_both_are_in_it(tiny_v1_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_v1_bundle, tmp_path / "bundle")

    def add(name: str) -> None:
        for number in range(20):
            rewrite_manifest(
                tmp_path / "bundle",
                lambda now, key=f"{name}{number}": replace(now, created_by=now.created_by | {key: "1"}),
            )

    threads = [threading.Thread(target=add, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"{name}{number}" for name in "ab" for number in range(20)} <= set(
        Bundle(tmp_path / "bundle").manifest.created_by
    )
