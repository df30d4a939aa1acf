"""What a benchmark's numbers depend on: the machine, its software, and what of the files is in memory already."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine_facts() -> dict[str, Any]:
    """CPU, memory, system, and how busy the machine is."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "cpu": found[1] if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "load_average_before": os.getloadavg()[0],
    }


def software_facts() -> dict[str, str]:
    """Versions of what is installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in ("monoedge", "onnxruntime", "onnxruntime-gpu", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def folder_size(folder: Path) -> int:
    """Size of a folder's files in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def drop_cached(folder: Path) -> float:
    """Drops the files of a folder from the page cache; returns the part that is still there."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # only what is on the disk can be dropped
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_part(folder)


def cached_part(folder: Path) -> float:
    """About how much of a folder's files is in the page cache, 0 … 1."""
    cached = total = 0.0
    for file in folder.rglob("*"):
        if not file.is_file() or not (size := file.stat().st_size):
            continue
        hits, samples = 0, min(64, -(-size // 4096))
        with file.open("rb", buffering=0) as stream:
            for index in range(samples):
                try:
                    # Reads what is cached, and fails where it would have to wait for the disk.
                    os.preadv(stream.fileno(), [bytearray(1)], index * size // samples, os.RWF_NOWAIT)
                    hits += 1
                except BlockingIOError:
                    continue
        cached, total = cached + size * hits / samples, total + size
    return cached / total if total else 0.0


def numpy_speed() -> dict[str, Any]:
    """What numpy reaches here and now, to tell a slow machine or a busy one from slow code."""
    import numpy as np

    matrix, vector = np.ones((8192, 8192), np.float32), np.ones(8192, np.float32)
    rows = np.ones((256, 8192), np.float32)

    def seconds(action: Callable[[], object]) -> float:
        times = []
        for _ in range(9):
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return {
        "flops": 2 * rows.size * len(matrix) / seconds(lambda: rows @ matrix),
        "bytes_per_second": matrix.nbytes / seconds(lambda: matrix @ vector),
    }
