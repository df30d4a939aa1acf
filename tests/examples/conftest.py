"""The examples are scripts that import their neighbours, as Python does for a script's own folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "shapes"))
