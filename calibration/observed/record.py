"""The record of an observation: the file from which scales are chosen, and from which an interrupted run goes on.

It is a ``.npz`` file of arrays, with a header in JSON that names the bundle and the data. It holds no pickles.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from calibration import CalibrationError
from calibration.observed.statistics import PHASES, Observed, Rows, Statistics, nothing
from runtime.bundle.manifest import REQUIRED_FILES, Manifest
from runtime.console.files import replaced
from runtime.records import find, parse_json, require_file

FORMAT = "monoedge-observation-2"
"""Format 1 had no caches."""

_ADVICE = "delete it, or name another file with --record"

_ARRAYS = ("low", "high", "squares", "sample", "priorities")


@dataclass(frozen=True)
class Origin:
    """All that an observation depends on. Two runs with equal origins make equal records.

    Attributes:
        bundle: SHA-256 over the hashes of the bundle's files.
        name: the bundle's name, for people.
        data: SHA-256 over the examples, as ``calibration.data.digest`` computes it.
        examples: how many there are.
        seed: of the sampled rows.
        max_tiles: the most tiles of a picture; None for the checkpoint's limit.
        max_new_tokens: the most tokens of an answer.
        matrices: names of the matrices whose inputs are observed.
    """

    bundle: str
    name: str
    data: str
    examples: int
    seed: int
    max_tiles: int | None
    max_new_tokens: int
    matrices: tuple[str, ...]


@dataclass
class Record:
    """Observations so far.

    Attributes:
        origin: what they depend on.
        done: how many of the examples have been observed.
        observed: statistics of both halves of the examples, by name of the matrix.
        caches: the largest magnitude of each channel of a cache, float32 [kv_heads, head_dim], by the names of
            ``runtime.backends.graph.cache_names``. Keys are those after rotary embedding.
    """

    origin: Origin
    done: int
    observed: dict[str, tuple[Observed, ...]]
    caches: dict[str, Rows] = field(default_factory=dict)

    @classmethod
    def nothing(cls, origin: Origin, channels: Sequence[int]) -> Record:
        """Makes a record without observations; ``channels`` are those of the origin's matrices."""
        pairs = zip(origin.matrices, channels, strict=True)
        return cls(origin, 0, {name: nothing(count) for name, count in pairs})

    @property
    def complete(self) -> bool:
        """Whether all examples have been observed."""
        return self.done == self.origin.examples

    def save(self, file: Path) -> None:
        """Writes the record: the same bytes for the same observations. A file that exists is replaced at the end.

        Raises:
            CalibrationError: it cannot be written.
        """
        header: dict[str, Any] = {"format": FORMAT, "origin": asdict(self.origin), "done": self.done, "rows": {}}
        arrays: dict[str, Any] = {}
        for name, halves in self.observed.items():
            for place, statistics in _places(name, halves):
                header["rows"][place] = statistics.rows
                arrays |= {f"{place}/{kind}": getattr(statistics, kind) for kind in _ARRAYS}
        header["caches"] = list(self.caches)
        arrays |= {f"caches/{name}": largest for name, largest in self.caches.items()}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        try:
            # Opened here: given a name, numpy adds an ending to it.
            with replaced(file) as partial, partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
        except OSError as error:
            raise CalibrationError(f"the record {file} cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, file: Path) -> Record:
        """Reads a record.

        Raises:
            CalibrationError: there is no record, or it is damaged or of another version of monoedge.
        """
        if find(file, CalibrationError) is None:
            raise CalibrationError(f"{file}: no such record")
        require_file(file, CalibrationError)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                header = parse_json(arrays["header"].tobytes().decode(), f"the header of {file}", CalibrationError)
                if header["format"] != FORMAT:
                    formats = f"{header['format']}, this one reads {FORMAT}"
                    raise CalibrationError(f"{file} is a record of another version of monoedge ({formats}): {_ADVICE}")
                origin = Origin(**{**header["origin"], "matrices": tuple(header["origin"]["matrices"])})
                observed = {name: _observed(arrays, header["rows"], name) for name in origin.matrices}
                caches = {name: _largest(arrays[f"caches/{name}"], name) for name in header["caches"]}
                return cls(origin, int(header["done"]), observed, caches)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise CalibrationError(f"{file} is not a record of a calibration, or a damaged one ({reason})") from None

    def require(self, origin: Origin, file: Path) -> None:
        """Checks that this record has an origin, and all matrices of it.

        Raises:
            CalibrationError: it has another; with what differs.
        """
        if self.origin.bundle != origin.bundle:
            raise CalibrationError(f"{file} is the record of another bundle ({self.origin.name}): {_ADVICE}")
        missing = set(origin.matrices) - set(self.origin.matrices)
        if missing:
            raise CalibrationError(
                f"{file} lacks {min(missing)} and {len(missing) - 1} more of the matrices to quantize: {_ADVICE}"
            )
        for item in fields(Origin):
            given, wanted = getattr(self.origin, item.name), getattr(origin, item.name)
            if given != wanted and item.name not in {"name", "matrices"}:
                what = "other data" if item.name == "data" else f"{item.name} {given}, not {wanted}"
                raise CalibrationError(f"{file} is a record with {what}: {_ADVICE}")


def bundle_hash(manifest: Manifest) -> str:
    """Returns the SHA-256 over the hashes of the files that answers depend on."""
    return hashlib.sha256("".join(manifest.files[name].sha256 for name in REQUIRED_FILES).encode()).hexdigest()


def _places(matrix: str, halves: Sequence[Observed]) -> Iterator[tuple[str, Statistics]]:
    """Yields the statistics of one matrix, each with its name in the file."""
    for half, observed in enumerate(halves):
        for phase in PHASES:
            yield f"{matrix}/{half}/{phase}", getattr(observed, phase)


def _largest(array: Any, name: str) -> Rows:  # noqa: ANN401 - whatever lies in the file
    if array.dtype != np.float32 or array.ndim != 2 or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"the cache {name} has {array.dtype} {list(array.shape)}")
    return np.asarray(array)


def _observed(arrays: Any, rows: dict[str, int], name: str) -> tuple[Observed, ...]:  # noqa: ANN401 - numpy's NpzFile
    halves = nothing(len(arrays[f"{name}/0/{PHASES[0]}/low"]))
    for place, statistics in _places(name, halves):
        statistics.rows = int(rows[place])
        for kind in _ARRAYS:
            array, fresh = arrays[f"{place}/{kind}"], getattr(statistics, kind)
            if array.dtype != fresh.dtype or array.shape[1:] != fresh.shape[1:]:
                raise ValueError(f"{place}/{kind} has {array.dtype} {list(array.shape)}")
            setattr(statistics, kind, array)
    return halves
