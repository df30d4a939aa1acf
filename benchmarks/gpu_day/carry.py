"""What the GPU day needs of a checkout, and how much that is: a machine takes 64 MiB, and has no network."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import MonoedgeError

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path("build/tensorrt_headers/kernel_lens/include/tensorrt")
"""TensorRT's headers as ``make build/tensorrt_headers`` puts them."""

NEEDED = (
    *("benchmarks", "plugins_trt", "runtime", "tests/benchmarks", "tests/plugins_trt"),
    *("CMakeLists.txt", "pyproject.toml", HEADERS),
)
MOST = 64 << 20
"""Bytes that may have to be carried."""

INSTALLED = (HEADERS, *(Path(f"/usr/include/{machine}-linux-gnu") for machine in ("x86_64", "aarch64")))


def files() -> Iterator[Path]:
    """Every file that is needed and here, in a fixed order."""
    for item in NEEDED:
        path = ROOT / item
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in found if file.is_file() and "__pycache__" not in file.parts)


def size() -> int:
    """Bytes of all of them.

    Raises:
        MonoedgeError: they are more than can be carried.
    """
    total = sum(file.stat().st_size for file in files())
    if total > MOST:
        raise MonoedgeError(f"the GPU day needs {total >> 20} MiB of the checkout, expected at most {MOST >> 20} MiB")
    return total


def digest() -> str:
    """Tells by 12 hexadecimal digits whether results are of the same sources."""
    sha256 = hashlib.sha256()
    for file in files():
        sha256.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return sha256.hexdigest()[:12]


def find_headers() -> Path | None:
    """The folder of TensorRT's headers, carried or installed."""
    found = (ROOT / folder for folder in INSTALLED if (ROOT / folder / "NvInferRuntime.h").is_file())
    return next(found, None)


def pack(target: Path) -> int:
    """Writes all that is needed as one archive, and returns its bytes."""
    size()
    with tarfile.open(target, "w:gz") as archive:
        for file in files():
            archive.add(file, f"monoedge/{file.relative_to(ROOT)}")
    return target.stat().st_size
