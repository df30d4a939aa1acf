// A few rows: bound by reading the weights. Each block reads 16 rows of one expert's matrix once, for all the rows of
// that expert; its warps share the summed dimension. An expert without rows is not read.
//
// The matrix is the 16-row operand of the tensor core and the expert's rows are the 8-row one. Each lane fetches its
// own share by cp.async. One row or eight cost the same arithmetic, which takes far less time than reading the matrix.
// In a gated step the 16 rows are 8 of gate and the same 8 of up, and a lane ends with both for its product.

#pragma once

#include "gemm.cuh"

namespace monoedge
{

struct DecodeTile
{
    static constexpr int kMaxRows{16};
    static constexpr int kWarps{8};
    static constexpr int kThreads{32 * kWarps};
    static constexpr int kAhead{4}; ///< How many pieces of 64 bytes of each matrix row a warp loads ahead.

    /// Columns of the output that a block makes.
    template <bool kGated>
    static constexpr int kColumns = kGated ? 8 : 16;

    /// Bytes of the ring. A place holds two pieces of the matrix, and the parts of the rows that multiply them.
    static constexpr int sharedBytes(int rowTiles, int parts)
    {
        return kAhead * kThreads * static_cast<int>(sizeof(Vector)) * (2 + rowTiles * parts);
    }
};

/// The rows of an expert, of at most 32 rows in all: bit r stands for row r.
__device__ inline std::uint32_t membersOf(Step const& step, int expert)
{
    auto const lane = static_cast<std::int32_t>(threadIdx.x % 32);
    return __ballot_sync(~0U, lane < step.rows && step.visualMask[lane] == (expert == 1));
}

/// The place of set bit number `index`, or -1.
__device__ inline int member(std::uint32_t members, int index)
{
    for (; index > 0; --index)
    {
        members &= members - 1U;
    }
    return __ffs(static_cast<int>(members)) - 1;
}

template <typename T, Format kFormat, bool kGated, int kRowTiles>
__device__ void decodeTile(Step const& step, StepExpert const& expert, std::uint32_t members)
{
    using Sum = SumOf<kFormat>;
    using Tile = DecodeTile;
    constexpr int kInputs = kRowTiles * kParts<kFormat>;
    auto const thread = static_cast<int>(threadIdx.x);
    int const warp = thread / 32;
    int const lane = thread % 32;
    int const group = lane / 4;
    int const quad = lane % 4;
    std::int32_t const firstColumn = static_cast<std::int32_t>(blockIdx.x) * Tile::kColumns<kGated>;

    // out is a multiple of 8, so the upper half of a tile is either whole or absent.
    bool const highPresent = kGated || firstColumn + 8 < step.out;
    std::int32_t const lowRow = firstColumn + group;
    std::int32_t const highRow = kGated ? step.out + lowRow : highPresent ? lowRow + 8 : lowRow;
    std::int64_t const weightStride = static_cast<std::int64_t>(step.in) * kWeightBytes<kFormat>;
    char const* const low = expert.weight + lowRow * weightStride + 16 * quad;
    char const* const high = expert.weight + highRow * weightStride + 16 * quad;

    char const* inputs[kRowTiles];
    bool inputPresent[kRowTiles];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
    {
        int const row = member(members, 8 * tile + group);
        inputPresent[tile] = row >= 0;
        inputs[tile] = expert.input + (row < 0 ? 0 : row) * expert.inputStride;
    }

    // 64 bytes of a matrix row make a piece; warps take them in turn. A lane reads back only what it copied itself, so
    // no lane waits for another.
    auto const chunks = static_cast<std::int32_t>(weightStride / 16);
    std::int32_t const pieces = (chunks + 3) / 4;
    auto* const ring = reinterpret_cast<Vector*>(ptx::dynamicShared()) + thread;
    auto const slot = [&](std::int32_t piece, int vector) {
        return ring + (piece / Tile::kWarps % Tile::kAhead * (2 + kInputs) + vector) * Tile::kThreads;
    };
    auto const start = [&](std::int32_t piece) {
        if (piece < pieces)
        {
            bool const inside = 4 * piece + quad < chunks;
            std::int64_t const offset = inside ? 64 * static_cast<std::int64_t>(piece) : -16 * quad;
            ptx::copyAsync(slot(piece, 0), low + offset, inside);
            ptx::copyAsync(slot(piece, 1), high + offset, inside && highPresent);
#pragma unroll
            for (int part = 0; part < kParts<kFormat>; ++part)
            {
                std::int64_t const chunk
                    = 4 * static_cast<std::int64_t>(piece) * kParts<kFormat> + inputChunk<kFormat>(quad, part);
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile)
                {
                    ptx::copyAsync(slot(piece, 2 + part * kRowTiles + tile), inputs[tile] + (inside ? 16 * chunk : 0),
                        inside && inputPresent[tile]);
                }
            }
        }
        ptx::commitCopies();
    };
    for (int i = 0; i < Tile::kAhead; ++i)
    {
        start(warp + i * Tile::kWarps);
    }
    Sum sums[kRowTiles][4]{};
    for (std::int32_t piece = warp; piece < pieces; piece += Tile::kWarps)
    {
        ptx::waitCopies<Tile::kAhead - 1>();
#pragma unroll
        for (int part = 0; part < kParts<kFormat>; ++part)
        {
            Vector lowOperand;
            Vector highOperand;
            operandOfWeight<T, kFormat>(lowOperand, *slot(piece, 0), part);
            operandOfWeight<T, kFormat>(highOperand, *slot(piece, 1), part);
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile)
            {
                Vector const input = *slot(piece, 2 + part * kRowTiles + tile);
                multiply<T, kFormat>(sums[tile], lowOperand, highOperand, input);
            }
        }
        start(piece + Tile::kAhead * Tile::kWarps);
    }

    // When every warp is done with its part of the ring, the sums of all take its place.
    __syncthreads();
    auto* const partial = reinterpret_cast<Sum*>(ptx::dynamicShared());
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            partial[((warp * kRowTiles + tile) * 4 + i) * 32 + lane] = sums[tile][i];
        }
    }
    __syncthreads();
    if (warp >= kRowTiles)
    {
        return;
    }
    Sum totals[4]{};
    for (int other = 0; other < Tile::kWarps; ++other)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            totals[i] += partial[((other * kRowTiles + warp) * 4 + i) * 32 + lane];
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
    {
        float const lowValue = dequantize<kFormat>(expert, lowRow, totals[i]);
        float const highValue = dequantize<kFormat>(expert, highRow, totals[2 + i]);
        int const row = member(members, 8 * warp + 2 * quad + i);
        if (row < 0)
        {
            continue;
        }
        if constexpr (kGated)
        {
            store<T, kGated>(expert, row, lowRow, gated(lowValue, highValue));
        }
        else
        {
            store<T, kGated>(expert, row, lowRow, lowValue);
            if (highPresent)
            {
                store<T, kGated>(expert, row, highRow, highValue);
            }
        }
    }
}

/// blockIdx.y is the expert.
template <typename T, bool kGated, int kRowTiles>
__global__ void __launch_bounds__(DecodeTile::kThreads, 2) decodeKernel(__grid_constant__ Step const step)
{
    auto const which = static_cast<int>(blockIdx.y);
    std::uint32_t const members = membersOf(step, which);
    if (members == 0)
    {
        return;
    }
    StepExpert const& expert = step.experts[which];
    withFormat(expert.format, [&](auto format) {
        decodeTile<T, decltype(format)::value, kGated, kRowTiles>(step, expert, members);
    });
}

} // namespace monoedge
