"""The one quantizer: float weights [out, in] to INT8, and INT8 to the blocks that ``MatMulNBits`` takes.

Row i of a matrix is INT8 numbers times ``scale[i]``, symmetric: -127 to 127, no zero point.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LARGEST = 127
"""The largest INT8 number in use; -128 would make the range lopsided."""

BLOCK_SIZES = {8: 128, 4: 32}
"""By the number of bits, how many elements of a row share a scale in ``MatMulNBits``, a power of two. It quantizes the
activations in blocks of the same size.

Measured on 2 cores with AVX-512 VNNI, one matrix [16384, 2048] of 8 bits: 128 is as fast as 256 with one row, and 256 a
tenth faster with 256 rows; 32 takes half as long again.
"""


def absmax_scale(weight: Floats) -> Floats:
    """Returns the scales [out] with which the largest magnitude of each row of [out, in] becomes ``LARGEST``.

    A row of zeros gets 1, since a scale must be positive. A row so small that its scale would be subnormal gets the
    smallest normal number: hardware may take less for zero.
    """
    largest = np.abs(weight).max(axis=1, initial=0).astype(np.float32)
    scale = np.maximum(largest / np.float32(LARGEST), np.finfo(np.float32).tiny)
    return np.where(largest == 0, np.float32(1), scale).astype(np.float32)


def quantize(weight: Floats, scale: Floats) -> npt.NDArray[np.int8]:
    """Returns ``weight / scale`` in float32, rounded as ``QuantizeLinear`` does (ties to even), and saturated.

    Args:
        weight: [out, in], finite.
        scale: [out], positive.
    """
    steps: Floats = np.rint(weight / scale[:, None])
    return steps.clip(-LARGEST, LARGEST).astype(np.int8)


def block_size(columns: int, bits: int = 8) -> int:
    """Returns that of ``BLOCK_SIZES``, or less (16 at least) for a matrix that would leave most of a block empty."""
    return max(16, min(BLOCK_SIZES[bits], 1 << (columns - 1).bit_length()))


def blocks(columns: int, size: int) -> int:
    """Returns how many blocks a row has; the last may be padded."""
    return -(-columns // size)


def pack(weight: npt.NDArray[np.int8], size: int) -> npt.NDArray[np.uint8]:
    """Returns INT8 [out, in] as ``MatMulNBits`` takes 8 bits: [out, blocks, size], where 128 stands for 0."""
    out, columns = weight.shape
    packed = np.full((out, blocks(columns, size) * size), 128, np.uint8)
    packed[:, :columns] = weight.view(np.uint8) ^ 128
    return packed.reshape(out, -1, size)


def block_scales(scale: Floats, columns: int, size: int) -> Floats:
    """Returns the scale of each row, [out], repeated for each block: [out, blocks]."""
    return np.repeat(scale[:, None], blocks(columns, size), axis=1)


def in_blocks(weight: Floats, size: int, bits: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Quantizes float weights as ``MatMulNBits`` takes them, each block with a scale of its own.

    With 8 bits the largest magnitude of a block becomes the largest number. With 4 the number of largest magnitude
    becomes -8, of which there is no positive, or that times one of ``SHRINKING``: what leaves the least squared error.

    Args:
        weight: [out, in], finite.
        size: elements of a block.
        bits: 8 or 4.

    Returns:
        uint8 [out, blocks, size · bits / 8], and the scales [out, blocks], which may be negative with 4 bits.
    """
    out, columns = weight.shape
    filled = np.zeros((out, blocks(columns, size) * size), np.float32)
    filled[:, :columns] = weight
    by_block = filled.reshape(-1, size)
    if bits == 8:
        scale = absmax_scale(by_block)
        packed = pack(quantize(by_block, scale), size)
    else:
        scale = _scale_of_4_bits(by_block)
        numbers = (_to_4_bits(by_block, scale) + 8).astype(np.uint8)
        packed = numbers[:, 0::2] + numbers[:, 1::2] * np.uint8(16)
    return packed.reshape(out, -1, size * bits // 8), scale.reshape(out, -1)


SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Factors of the scale with 4 bits: clipping the largest of a block can be worth finer steps for the rest.

Root mean square of the error, of that of normally distributed weights, in blocks of 32: 0.097 with -7 to 7, 0.086 with
-8 to 7, 0.082 with these; 0.081 with a zero point a block, which would be one more input of every operator.
"""


def _scale_of_4_bits(by_block: Floats) -> Floats:
    place = np.abs(by_block).argmax(axis=1)
    largest = np.take_along_axis(by_block, place[:, None], axis=1)[:, 0]
    full = np.where(np.abs(largest) < np.finfo(np.float32).tiny * 16, np.float32(1), largest / np.float32(-8))
    best, least = full, np.full(len(by_block), np.inf, np.float32)
    for factor in SHRINKING:
        scale = full * np.float32(factor)
        error = np.square(_to_4_bits(by_block, scale) * scale[:, None] - by_block).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best.astype(np.float32)


def _to_4_bits(by_block: Floats, scale: Floats) -> Floats:
    steps: Floats = np.rint(by_block / scale[:, None])
    return steps.clip(-8, 7)
