"""Where the plugin library is: built here, installed beside ``plugins_trt``, or in a folder of the system."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BackendError

LIBRARY = "libmonoedge_plugins.so"
VARIABLE = "MONOEDGE_PLUGIN_LIBRARY"
"""Environment variable that names the library, before all places that are looked through."""

BUILD_COMMAND = "cmake -B build -S . && cmake --build build"
"""Builds the library, in a checkout of monoedge."""

_CHECKOUT = Path(__file__).resolve().parents[2]
_SYSTEM = (
    Path("/usr/local/lib"),
    Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or ""),
    Path("/usr/lib"),
)


def plugin_library() -> Path:
    """The path of the plugin library, absolute.

    Raises:
        BackendError: it is nowhere, or not where the environment variable says.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise BackendError(f"{VARIABLE} is {named}, which is no file: correct it, or build with {_advice()}")
        return path
    places = list(_places())
    for folder in places:
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise BackendError(
        f"{LIBRARY} is in none of {', '.join(map(str, places))}: build it with {_advice()}, or set {VARIABLE}"
    )


def _advice() -> str:
    return f'"{BUILD_COMMAND}" in a checkout of monoedge'


def _places() -> Iterator[Path]:
    if (_CHECKOUT / "CMakeLists.txt").is_file():
        yield _CHECKOUT / "build"
    yield _CHECKOUT / "plugins_trt"
    yield Path(sys.prefix) / "lib"
    yield from _SYSTEM
