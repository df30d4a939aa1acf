"""Where files of the backends are: the plugin library, and the folder for caches.

The library is built here, installed beside ``plugins_trt``, or in a folder of the system.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BackendError
from runtime.records import find, is_folder, read_bytes, user_path

LIBRARY = "libmonoedge_plugins.so"
VARIABLE = "MONOEDGE_PLUGIN_LIBRARY"
"""Environment variable that names the library; then no folder is searched."""

BUILD_COMMAND = "monoedge plugin"

OLDEST = 80
"""The first GPUs whose kernels there are, as 80 for 8.0: older ones have no ``cp.async`` and no bf16 (PTX ISA)."""

_FATBIN = re.compile(rb"\x50\xed\x55\xba\x01\x00\x10\x00")
"""What code for GPUs begins with in a library: magic number, version and header size; the rest's size follows."""

_TEGRA = (53, 62, 72, 87, 101, 110)
"""Jetsons, for which no machine code of another GPU is, nor theirs for others (CUDA Programming Guide)."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_SYSTEM = (Path("/usr/local/lib"), Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or ""), Path("/usr/lib"))


def plugin_library() -> Path:
    """Returns the absolute path of the plugin library.

    Raises:
        BackendError: it is nowhere, or not where the environment variable says.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = user_path(named).absolute()
        if find(path, BackendError) is None or is_folder(path, BackendError):
            raise BackendError(f"{VARIABLE} is {named}, which is no file: correct it, or build with: {BUILD_COMMAND}")
        return path
    places = list(_places())
    for folder in places:
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise BackendError(
        f"{LIBRARY} is in none of {', '.join(map(str, places))}: build it with: {BUILD_COMMAND}; or set {VARIABLE}"
    )


def require_code(library: Path, capability: int) -> None:
    """Checks that a library has code for a GPU: machine code, or PTX, which the GPU's driver compiles.

    The file is read and not loaded or asked: so it may be for another CPU, as where commands are printed for a device,
    it needs no CUDA driver, and what it says is what the driver would find.

    Args:
        library: the plugin library. One in which no code can be found is left to CUDA.
        capability: that of the GPU, as 89 for 8.9.

    Raises:
        BackendError: it has none, with the command that builds it.
    """
    found = gpu_code(library)
    if found and not any(_runs(is_ptx, number, capability) for is_ptx, number in found):
        here = ", ".join(f"{'PTX ' if is_ptx else ''}{number}" for is_ptx, number in sorted(found))
        place = "" if library.parent == install_folder() else f" -o {shlex.quote(str(library))}"
        raise BackendError(
            f"{library} has no code for SM {capability}, only for SM {here}: build it with: "
            f"{BUILD_COMMAND} --arch {capability}{place}"
        )


def gpu_code(library: Path) -> set[tuple[bool, int]]:
    """Returns the code for GPUs in a library: whether it is PTX, and its architecture.

    Raises:
        BackendError: the library cannot be read.
    """
    data, found = read_bytes(library, BackendError), set()
    for start in _FATBIN.finditer(data):
        place = start.end() + 8
        end = place + int.from_bytes(data[start.end() : place], "little")
        while place + 64 <= min(end, len(data)):
            kind, _, header, size, architecture = struct.unpack_from("<HHIQ12xI", data, place)
            found.add((kind == 1, architecture))
            place += max(header + size, 64)
    return found


def _runs(is_ptx: bool, architecture: int, capability: int) -> bool:
    if is_ptx or architecture == capability:
        return architecture <= capability
    same = architecture // 10 == capability // 10 and not {architecture, capability} & set(_TEGRA)
    return same and architecture < capability


def install_folder() -> Path:
    """Returns the folder for a library that is built here: the first that is searched and can be written to."""
    if is_checkout():
        return _CHECKOUT / "build"
    shared = Path(sys.prefix) / "lib"
    return shared if os.access(shared, os.W_OK) else _user_folder()


def is_checkout() -> bool:
    """Whether monoedge runs from a checkout, where builds go to ``build/``."""
    return (_CHECKOUT / "CMakeLists.txt").is_file()


def cache_folder() -> Path:
    """Returns the folder for what monoedge keeps between runs and could make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "monoedge"


def _user_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "monoedge"


def _places() -> Iterator[Path]:
    if is_checkout():
        yield _CHECKOUT / "build"
    yield _CHECKOUT / "plugins_trt"
    yield Path(sys.prefix) / "lib"
    yield _user_folder()
    yield from _SYSTEM
