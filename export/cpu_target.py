"""What ``--target cpu`` is called, and what ``--weights`` takes with it."""

from __future__ import annotations

CPU_TARGET = "cpu"

FP32, INT8, INT4 = CPU_WEIGHTS = ("fp32", "int8", "int4")
"""The decoder's matrices: 32-bit floats; integers of 8 bits; of 4 bits in the feed-forward experts, 8 in the rest."""
