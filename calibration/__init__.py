"""INT8 calibration of the text experts."""

from runtime.errors import MonoedgeError


class CalibrationError(MonoedgeError):
    """Data, a record or a bundle does not fit, or a budget cannot be held."""
