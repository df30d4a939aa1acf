"""What a user chooses for an export, before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bundle.targets import PORTABLE_TARGET
from runtime.errors import OptionError

CPU_TARGET = "cpu"

TARGETS = (CPU_TARGET, PORTABLE_TARGET)
"""Values of ``--target``; without it, graphs are for any runtime that has opset 24."""

CPU_WEIGHTS: dict[str, tuple[int, int] | None] = {"fp32": None, "int8": (8, 8), "int4": (4, 8)}
"""Values of ``--weights``: bits of the feed-forward experts' matrices and of all others; None for floats."""

DEFAULT_MAX_LENGTH = 8192
"""Tokens that a conversation may have unless ``--max-length`` says otherwise. It costs the size of the rotary
tables only: caches grow as needed at run time."""


@dataclass(frozen=True)
class ExportOptions:
    """What an export makes.

    Attributes:
        precision: number format of weights and activations: ``fp32``, ``bf16`` or ``fp16``.
        max_length: tokens that a conversation may have; None for ``DEFAULT_MAX_LENGTH``, or what the model has.
        target: one of ``TARGETS``, or None.
        weights: one of ``CPU_WEIGHTS``, with ``--target cpu`` alone; None for fp32.
        overwrite: replace a bundle that is there already.

    Raises:
        OptionError: options that contradict each other.
    """

    precision: str = "fp32"
    max_length: int | None = None
    target: str | None = None
    weights: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and self.target != CPU_TARGET:
            raise OptionError(f"--weights {self.weights} is for --target cpu: add that, or leave it out")
        if self.target == CPU_TARGET and self.precision != "fp32":
            raise OptionError(f"--target cpu computes in fp32: leave out --dtype {self.precision}")

    def length(self, most: int) -> int:
        """Returns how many tokens a conversation may have.

        Args:
            most: positions that the model has.

        Raises:
            OptionError: ``max_length`` is more, or less than 1.
        """
        if self.max_length is None:
            return min(DEFAULT_MAX_LENGTH, most)
        if not 1 <= self.max_length <= most:
            raise OptionError(f"--max-length {self.max_length} does not fit: max_position_embeddings = {most}")
        return self.max_length
