"""The token embeddings of a bundle: a file of rows, read one by one.

A memory-mapped file would need no copies, but Linux maps whole pages of up to 2 MB around each row that is touched. A
few hundred different tokens then make the whole table resident (0.76 GB at full size; seen with Linux 6.18 and ext4).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError


class Embeddings:
    """Reads rows of a file by their numbers; may be used from several threads at once, and after a fork.

    Args:
        file: holds [rows, columns] in ``dtype``, row by row.
        shape: rows and columns.
        dtype: the type of the numbers.

    Raises:
        BundleError: the file cannot be read, or has another size.
    """

    def __init__(self, file: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype, self._path = shape, dtype, file
        self._row_bytes = shape[1] * dtype.itemsize
        try:
            self._file = file.open("rb", buffering=0)
            size = file.stat().st_size
        except OSError as error:
            raise BundleError(f"{file} cannot be read: {error.strerror}") from None
        if size != shape[0] * self._row_bytes:
            raise BundleError(f"{file} has {size:,} bytes, expected {shape[0] * self._row_bytes:,}: copy it again")

    def __getitem__(self, ids: npt.ArrayLike) -> npt.NDArray[Any]:
        """Reads the rows of these numbers, [n] → [n, columns], into a new array.

        Raises:
            BundleError: the file cannot be read any more.
            IndexError: there is no such row.
        """
        wanted = np.asarray(ids, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.shape[0]):
            raise IndexError(f"rows 0 to {self.shape[0] - 1} are there, got {wanted.min()} to {wanted.max()}")
        rows = np.empty((wanted.size, self.shape[1]), self.dtype)
        try:
            for row, number in zip(rows, wanted.flat, strict=True):
                # By its place: the place in the file is shared with other threads, and after a fork with the parent.
                data = os.pread(self._file.fileno(), self._row_bytes, int(number) * self._row_bytes)
                if len(data) != self._row_bytes:
                    raise BundleError(f"{self._path} ends too early: copy the bundle again")
                row[:] = np.frombuffer(data, self.dtype)
        except OSError as error:
            raise BundleError(f"{self._path} cannot be read: {error.strerror}") from None
        return rows.reshape(*wanted.shape, self.shape[1])

    def __del__(self) -> None:
        # Without a ResourceWarning, and whether or not __init__ came so far.
        if file := self.__dict__.get("_file"):
            file.close()
