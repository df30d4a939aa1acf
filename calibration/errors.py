"""The error of this package."""

from __future__ import annotations

from runtime.errors import MonoedgeError


class CalibrationError(MonoedgeError):
    """Data, a record or a bundle does not fit, or a budget cannot be held."""
