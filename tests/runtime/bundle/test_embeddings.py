"""Rows of the embeddings' file, whoever reads beside us."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from runtime.bundle.embeddings import Embeddings
from runtime.errors import BundleError

ROWS, COLUMNS = 4096, 64


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Each row holds its own number."""
    np.repeat(np.arange(ROWS, dtype="<f4"), COLUMNS).tofile(tmp_path / "rows")
    return tmp_path / "rows"


def open_rows(file: Path) -> Embeddings:
    return Embeddings(file, (ROWS, COLUMNS), np.dtype("<f4"))


def wrong_rows(rows: Embeddings, seed: int) -> int:
    """Reads rows at random; returns how many of them are not those asked for."""
    ids = np.random.default_rng(seed).integers(0, ROWS, 20000)
    return int((rows[ids] != ids[:, None]).any(axis=1).sum())


def test_rows(file: Path) -> None:
    np.testing.assert_array_equal(open_rows(file)[[[3, 0], [ROWS - 1, 3]]][..., 0], [[3, 0], [ROWS - 1, 3]])
    assert open_rows(file)[[]].shape == (0, COLUMNS)


def test_rows_are_right_after_a_fork(file: Path) -> None:
    """Parent and children share the place in an open file, and read at once."""
    rows = open_rows(file)
    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            os._exit(min(wrong_rows(rows, seed), 1))
        children.append(child)
    wrong = wrong_rows(rows, len(children))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert wrong == 0


def test_rows_are_right_in_several_threads(file: Path) -> None:
    rows, wrong = open_rows(file), [-1] * 4

    def read(seed: int) -> None:
        wrong[seed] = wrong_rows(rows, seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(len(wrong))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0, 0]


def test_a_file_that_is_cut_off_later_is_said(file: Path) -> None:
    rows = open_rows(file)
    os.truncate(file, 4 * COLUMNS * (ROWS - 1))
    with pytest.raises(BundleError, match="ends too early"):
        rows[[ROWS - 1]]


@pytest.mark.parametrize("change", [-1, 1, 4 * COLUMNS])
def test_a_file_of_another_size_is_refused(file: Path, change: int) -> None:
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(BundleError, match="expected 1,048,576: copy it again"):
        open_rows(file)
