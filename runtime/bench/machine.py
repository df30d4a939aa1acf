"""What a benchmark's numbers depend on: the machine, its software, its memory, and how much of the files is cached.

Facts come from Linux's /proc and /sys; on other systems they are missing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from timeit import repeat
from typing import Any

import numpy as np

BACKENDS = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "torch", "llama-cpp-python")
"""Packages that compute. A benchmark names the versions of those that are installed."""

READ_BYTES = 512 << 20
"""Bytes that one measurement of the read bandwidth reads: more than any cache holds."""


def machine_facts() -> dict[str, Any]:
    """Returns processor, memory, GPU, power mode, system, and load average."""
    cpu = re.search(r"^model name\s*:\s*(.+)", _text("/proc/cpuinfo"), re.M)
    return {
        # Arm systems name the board instead.
        "cpu": cpu[1] if cpu else _text("/proc/device-tree/model").strip("\0\n") or platform.machine(),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"),
        "power_mode": _power_mode(),
        "system": platform.platform(),
        "load_average_before": os.getloadavg()[0],
    }


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _power_mode() -> str:
    """Returns a Jetson's power mode, otherwise the frequency governors of the cores, otherwise ``unknown``."""
    found = re.search(r"Power Mode: *(\S+)", _output("nvpmodel", "-q"))
    if found:
        return found[1]
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    governors = sorted({_text(file).strip() for file in files})
    return f"governor {', '.join(governors)}" if governors else "unknown"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _text(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Returns the output of a system's tool, on one line; empty where there is none or it fails."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands
            command, capture_output=True, text=True, check=True, timeout=20, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ")


@dataclass
class Memory:
    """Memory of this process in bytes; None where it is not known.

    Attributes:
        peak: the most that was resident so far, mapped files included (VmHWM).
        anonymous: resident memory that cannot be evicted (RssAnon).
        mapped: resident pages of mapped files, which other processes share and the system may evict (RssFile).
        taken: by how much the system's available memory fell since the process began. Other processes count too, and so
            does a GPU that shares the memory: on a Jetson this is the only measure of it.
        gpu: memory of a separate GPU that this process holds, from nvidia-smi.
    """

    peak: int | None = None
    anonymous: int | None = None
    mapped: int | None = None
    taken: int | None = None
    gpu: int | None = None


class MemoryWatch:
    """Samples this process's memory, and keeps the largest of each value."""

    def __init__(self) -> None:
        self._available = _kilobytes("/proc/meminfo", "MemAvailable")
        self.most = Memory()

    def sample(self) -> None:
        """Takes a sample."""
        available = _kilobytes("/proc/meminfo", "MemAvailable")
        names = {"peak": "VmHWM", "anonymous": "RssAnon", "mapped": "RssFile"}
        now = {name: _kilobytes("/proc/self/status", key) for name, key in names.items()}
        if available is not None and self._available is not None:
            now["taken"] = self._available - available
        for name, value in now.items():
            known = [each for each in (value, getattr(self.most, name)) if each is not None]
            setattr(self.most, name, max(known, default=None))

    def sample_gpu(self) -> None:
        """Takes the GPU's memory, which starts nvidia-smi."""
        listed = _output("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
        self.most.gpu = gpu_bytes(listed.split("; "), os.getpid())


def gpu_bytes(lines: Iterable[str], process: int) -> int | None:
    """Returns a process's memory on all GPUs from nvidia-smi's list of ``pid, MiB``; None if it is not listed."""
    found = [re.fullmatch(r"(\d+), *(\d+)", line.strip()) for line in lines]
    sizes = [int(match[2]) << 20 for match in found if match and int(match[1]) == process]
    return sum(sizes) if sizes else None


def _kilobytes(file: str, key: str) -> int | None:
    found = re.search(rf"^{key}:\s+(\d+) kB", _text(file), re.M)
    return int(found[1]) * 1024 if found else None


def drop_cached(folder: Path) -> None:
    """Drops the files of a folder from the page cache, as far as nothing maps them."""
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_part(folder: Path) -> float | None:
    """Returns about how much of a folder's files is in the page cache, 0 … 1; None where that is not known."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    cached = total = 0.0
    for file in filter(Path.is_file, folder.rglob("*")):
        size, hits = file.stat().st_size, 0
        samples = min(64, -(-size // 4096))
        with file.open("rb", buffering=0) as stream:
            for index in range(samples):
                try:
                    # Reads what is cached, and fails where it would have to wait for the disk.
                    os.preadv(stream.fileno(), [bytearray(1)], index * size // samples, os.RWF_NOWAIT)
                    hits += 1
                except OSError:  # not cached; a file system that does not say counts as not cached
                    continue
        cached, total = cached + size * hits / max(samples, 1), total + size
    return cached / total if total else 0.0


def read_bandwidth() -> float:
    """Measures the bytes per second that all cores together read from memory, the best of several passes.

    Each core ORs its part of an array; numpy does that in vector registers and without Python's lock. Nothing is
    written, as decoding writes almost nothing.
    """
    # Written, or all pages would be the one of zeros.
    words = np.ones(min(READ_BYTES, _memory_bytes() // 16) // 8, np.int64)
    parts = np.array_split(words, cores())
    with ThreadPoolExecutor(len(parts)) as threads:
        return words.nbytes / min(repeat(lambda: list(threads.map(np.bitwise_or.reduce, parts)), number=1, repeat=15))


def matmul_speed() -> float:
    """Measures the float32 operations per second of numpy's matrix product, the best of several.

    Prompts are computed at about that speed.
    """
    rows, matrix = np.ones((256, 4096), np.float32), np.ones((4096, 4096), np.float32)
    return 2 * rows.size * len(matrix) / min(repeat(lambda: rows @ matrix, number=1, repeat=9))
