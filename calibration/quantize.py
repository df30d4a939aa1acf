"""The one quantizer: float weights [out, in] to INT8, and INT8 to the blocks that ``MatMulNBits`` takes.

Row i of a matrix is INT8 numbers times ``scale[i]``, symmetric: -127 to 127, no zero point.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LARGEST = 127
"""The largest INT8 number in use; -128 would make the range lopsided."""

BLOCK_SIZE = 128
"""Places of a row that share a scale in ``MatMulNBits``. There, each such block of the activations is made INT8 too.

Measured on 2 cores with AVX-512 VNNI, one matrix [16384, 2048]: as fast as 256 with one row, and 256 is a tenth faster
with 256 rows; 32 takes half as long again.
"""


def absmax_scale(weight: Floats) -> Floats:
    """Scales [out] with which the largest magnitude of each row of [out, in] becomes ``LARGEST``.

    A row of zeros gets 1, since a scale must be positive. A row so small that its scale would be subnormal gets the
    smallest normal number: hardware may take less for zero.
    """
    largest = np.abs(weight).max(axis=1, initial=0).astype(np.float32)
    scale = np.maximum(largest / np.float32(LARGEST), np.finfo(np.float32).tiny)
    return np.where(largest == 0, np.float32(1), scale).astype(np.float32)


def quantize(weight: Floats, scale: Floats) -> npt.NDArray[np.int8]:
    """``weight / scale`` in float32, rounded to nearest with ties to even as ``QuantizeLinear`` does, and saturated.

    Args:
        weight: [out, in], finite.
        scale: [out], positive.
    """
    steps: Floats = np.rint(weight / scale[:, None])
    return steps.clip(-LARGEST, LARGEST).astype(np.int8)


def block_size(columns: int) -> int:
    """``BLOCK_SIZE``, or less for a matrix so narrow that most of one block would be filling: a power of two, 16 up."""
    return max(16, min(BLOCK_SIZE, 1 << (columns - 1).bit_length()))


def blocks(columns: int, size: int) -> int:
    """How many blocks a row has; the last may be filled up."""
    return -(-columns // size)


def pack(weight: npt.NDArray[np.int8], size: int) -> npt.NDArray[np.uint8]:
    """INT8 [out, in] as ``MatMulNBits`` takes 8 bits: [out, blocks, size], 128 standing for 0."""
    out, columns = weight.shape
    packed = np.full((out, blocks(columns, size) * size), 128, np.uint8)
    packed[:, :columns] = weight.view(np.uint8) ^ 128
    return packed.reshape(out, -1, size)


def block_scales(scale: Floats, columns: int, size: int) -> Floats:
    """The scale of each row, [out], for each block of it: [out, blocks]."""
    return np.repeat(scale[:, None], blocks(columns, size), axis=1)
