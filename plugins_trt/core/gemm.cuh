// What both tensor-core paths are made of: a lane's 16 bytes of a row as operand of two products.
//
// A dot product may be summed in any order, as long as both sides agree. So a lane takes 16 bytes of a row as they lie,
// where the hardware's layout would have it take four words from four places: lane
// (group, quad) holds chunk `quad` of 64 bytes of row `group`, words 0 and 1 are its share of a first product, words 2
// and 3 of a second one. One wide load, from global or from shared memory alike, feeds two products; nothing is
// shuffled and no ldmatrix is needed.

#pragma once

#include "step.cuh"

namespace monoedge
{

/// How many operands a lane makes of its 16 bytes of weight: int8 weights widened to 16 bits are twice as long.
template <Format kFormat>
constexpr int kParts = kFormat == Format::kInt8Weight ? 2 : 1;

/// Part `part` of a lane's weight as an operand.
template <typename T, Format kFormat>
__device__ void operandOfWeight(Vector& operand, Vector const& weight, int part)
{
    if constexpr (kFormat == Format::kInt8Weight)
    {
        T::widen(weight.words[2 * part], operand.words[0], operand.words[1]);
        T::widen(weight.words[2 * part + 1], operand.words[2], operand.words[3]);
    }
    else
    {
        operand = weight;
    }
}

/// Which chunk of 16 bytes of a row multiplies part `part` of a lane's weight, counted from the first chunk that
/// belongs to the 64 bytes of weight.
template <Format kFormat>
__device__ int inputChunk(int quad, int part)
{
    return kFormat == Format::kInt8Weight ? 2 * quad + part : quad;
}

/// Adds both products of the operands: 16 rows of `a`, of which a lane holds row `group` (aLow) and `group + 8`
/// (aHigh), times 8 rows of `b`. The lane's sums: rows of a `group`, `group`, `group + 8`, `group + 8`; rows of b
/// 2 · quad, 2 · quad + 1, and the same again.
template <typename T, Format kFormat>
__device__ void multiply(SumOf<kFormat> (&sums)[4], Vector const& aLow, Vector const& aHigh, Vector const& b)
{
#pragma unroll
    for (int i = 0; i < 4; i += 2)
    {
        if constexpr (kFormat == Format::kInt8)
        {
            ptx::mmaInt8(sums, aLow.words[i], aHigh.words[i], aLow.words[i + 1], aHigh.words[i + 1], b.words[i],
                b.words[i + 1]);
        }
        else
        {
            T::mma(sums, aLow.words[i], aHigh.words[i], aLow.words[i + 1], aHigh.words[i + 1], b.words[i],
                b.words[i + 1]);
        }
    }
}

} // namespace monoedge
