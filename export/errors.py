"""The errors that this package raises on purpose, beside those of ``runtime.errors``."""

from __future__ import annotations

from runtime.errors import MonoedgeError


class CheckpointError(MonoedgeError):
    """A checkpoint that is missing, damaged, or not a Mono-InternVL that can be exported."""


class QuantizationError(MonoedgeError):
    """A bundle that cannot be quantized, or a plan that does not fit it."""
