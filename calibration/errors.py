"""The error that this package raises on purpose."""

from __future__ import annotations

from runtime.errors import MonoedgeError


class CalibrationError(MonoedgeError):
    """Data, a record or a bundle that cannot be calibrated with, or a budget that does not hold."""
