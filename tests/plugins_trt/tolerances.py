"""How far a kernel may be from float64, by number format: the one table.

The reference starts from the same 16-bit or int8 numbers and rounds nothing on the way but what the definition rounds.
What remains between it and a correct kernel, per element of the output y, with u the unit roundoff of the 16-bit type:

* The result is rounded once: u · |y|, and where y is subnormal, half of the smallest step.
* FusedMoE's product p is rounded once before `down`, with errors that are independent of each other. Each is at most
  u · |p|, u / √3 · |p| in the mean square at worst, so that y = Σ d · p is off by a normal deviate of at most
  u / √3 · ‖d∘p‖. Over a million elements the largest is 5 times that: 3 · u · ‖d∘p‖. Where p is subnormal, it is off by
  half of the smallest step, which makes at most that times Σ |d|.
* Sums are in float: their error grows with the sum of the magnitudes, Σ |d| · |p|, and so does what the gate and up
  sums bring, whose own magnitudes are Σ |w| · |x|. `ACCUMULATION` is for both. On a CPU at most 2⁻²⁵ of them was
  seen. A tensor core may cut off where a CPU rounds, up to 2⁻²³ of the sum in each of K / 16 steps; with random signs
  the sum is about 1.25 / √K of the magnitudes, which makes 2⁻²⁰ for K = 8192.
* A product quantized to int8 may come out one step further where it lies by a tie. Two such steps are allowed.

The first point is sharp: the worst elements of the emulated kernels reach 0.99 of what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Of one type of activations."""

    unit_roundoff: float
    smallest: float
    """Smallest positive number."""


TOLERANCES = {
    "bfloat16": Tolerance(unit_roundoff=2.0**-8, smallest=2.0**-133),
    "float16": Tolerance(unit_roundoff=2.0**-11, smallest=2.0**-24),
    # For the operators' bodies; there are no kernels in it.
    "float32": Tolerance(unit_roundoff=2.0**-24, smallest=2.0**-149),
}

PRODUCT_DEVIATIONS = 3.0
ACCUMULATION = 2.0**-19
QUANTIZATION_FLIPS = 2
