"""How packages that are missing are installed. monoedge itself is on no index, so that its extras cannot be named."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import PackageNotFoundError, requires


def install_command(package: str) -> str:
    """Returns the command that installs a package, with the bounds that monoedge has for it.

    Args:
        package: its name, as ``huggingface-hub``.
    """
    try:
        known = requires("monoedge") or []
    except PackageNotFoundError:  # a checkout that is not installed
        known = []
    bounds = (re.split(r"\s*;", line)[0] for line in known if re.match(rf"{re.escape(package)}(?![\w-])", line))
    return f"pip install {shlex.quote(next(bounds, package))}"
