"""How packages that are missing are installed. monoedge itself is on no index, so that its extras cannot be named."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires

BASE = {"numpy": "numpy", "PIL": "pillow", "tokenizers": "tokenizers", "tqdm": "tqdm"}
"""What monoedge needs whatever computes: modules, and the packages that bring them."""


def install_command(package: str) -> str:
    """Returns the command that installs a package, with the bounds that monoedge has for it.

    Args:
        package: its name, as ``huggingface-hub``.
    """
    return f"pip install {shlex.quote(requirement(package))}"


def requirement(package: str) -> str:
    """Returns a package with the bounds that monoedge has for it in this Python: ``numpy>=1.26``."""
    try:
        known = requires("monoedge") or []
    except PackageNotFoundError:  # a checkout that is not installed
        known = []
    lines = (line for line in known if re.match(rf"{re.escape(package)}(?![\w-])", line) and _is_for_this_python(line))
    return next((re.split(r"\s*;", line)[0] for line in lines), package)


def _is_for_this_python(line: str) -> bool:
    found = re.search(r"python_version\s*(>=|<)\s*['\"](\d+)\.(\d+)['\"]", line)
    if found is None:
        return True
    is_later = sys.version_info >= (int(found[2]), int(found[3]))
    return is_later if found[1] == ">=" else not is_later
