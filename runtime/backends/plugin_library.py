"""Where files of the backends are: the plugin library, and the folder for caches.

The library is built here, installed beside ``plugins_trt``, or in a folder of the system.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import BackendError
from runtime.records import find, is_folder, user_path

LIBRARY = "libmonoedge_plugins.so"
VARIABLE = "MONOEDGE_PLUGIN_LIBRARY"
"""Environment variable that names the library; then no folder is searched."""

BUILD_COMMAND = "monoedge plugin"

_CHECKOUT = Path(__file__).resolve().parents[2]
_SYSTEM = (
    Path("/usr/local/lib"),
    Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or ""),
    Path("/usr/lib"),
)


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
