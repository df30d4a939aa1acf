"""Where the plugin library is: built here, installed beside this package, or in a folder of the system."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "libmonoedge_plugins.so"
VARIABLE = "MONOEDGE_PLUGIN_LIBRARY"
"""Environment variable that names the library, before all places that are looked through."""

BUILD_COMMAND = "cmake -B build -S . && cmake --build build"
"""Builds the library, in a checkout of monoedge."""

_PACKAGE = Path(__file__).resolve().parent
_SYSTEM = (
    Path("/usr/local/lib"),
    Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or ""),
    Path("/usr/lib"),
)


class PluginLibraryError(FileNotFoundError):
    """There is no plugin library. The message, one line, says where it was looked for and how to build it.

    This package imports nothing of ours, so it is no ``MonoedgeError``: callers with one of their own raise that
    with this message.
    """


def plugin_library() -> Path:
    """The path of the plugin library, absolute.

    Raises:
        PluginLibraryError: it is nowhere, or not where the environment variable says.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser().absolute()
        if not path.is_file():
            raise PluginLibraryError(f"{VARIABLE} is {named}, which is no file: correct it, or build with {_advice()}")
        return path
    places = list(_places())
    for folder in places:
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise PluginLibraryError(
        f"{LIBRARY} is in none of {', '.join(map(str, places))}: build it with {_advice()}, or set {VARIABLE}"
    )


def _advice() -> str:
    return f'"{BUILD_COMMAND}" in a checkout of monoedge'


def _places() -> Iterator[Path]:
    checkout = _PACKAGE.parent
    if (checkout / "CMakeLists.txt").is_file():
        yield checkout / "build"
    yield _PACKAGE
    yield Path(sys.prefix) / "lib"
    yield from _SYSTEM
