// Many rows: one grouped product over both experts. Persistent blocks walk over tiles, whose number only the device
// knows. Rows are gathered as they are loaded and scattered as they are stored, so a row is computed once, by its own
// expert.
//
// The expert's rows are the 16-row operand of the tensor core, rows of the matrix the 8-row one. Both pass through
// shared memory in a ring of stages that cp.async fills ahead. In a gated step a warp's 64 rows of the matrix are 32 of
// gate and the same 32 of up, and a lane ends with both for its products.

#pragma once

#include "gemm.cuh"
#include "tiles.cuh"

namespace monoedge
{

template <int kWarpsDown, int kWarpsAcross>
struct PrefillTile
{
    static constexpr int kAcross{kWarpsAcross};
    static constexpr int kThreads{32 * kWarpsDown * kWarpsAcross};
    static constexpr int kRows{32 * kWarpsDown};
    static constexpr int kWeightRows{64 * kWarpsAcross};
    static constexpr int kStages{3};
    static constexpr int kLineBytes{128}; ///< Of each row, and of each row of the matrix, in a stage.
    static constexpr int kStageBytes{(kRows + kWeightRows) * kLineBytes};
    static constexpr int kSharedBytes{kStages * kStageBytes};

    /// Columns of the output that a tile makes.
    template <bool kGated>
    static constexpr int kColumns = kGated ? kWeightRows / 2 : kWeightRows;
};

using LargeTile = PrefillTile<4, 2>;
using SmallTile = PrefillTile<2, 1>;

/// Where chunk `chunk` of 16 bytes of line `line` lies in a stage's part of kLines lines. Lines are stored as two
/// blocks of 64 bytes. In the second one neighbouring lines, and neighbouring chunks, change places. So each of the
/// accesses of eight lanes meets all banks once: storing a line, loading 64 bytes of two neighbouring lines, and
/// loading every other chunk of them.
template <int kLines>
__device__ int placeOf(int line, int chunk)
{
    int const block = chunk / 4;
    return 16 * ((block * kLines + (line ^ block)) * 4 + (chunk % 4 ^ block));
}

/// The copies of one operand that a thread makes for each stage: chunk `chunk` of lines firstLine, firstLine + kStep, …
template <int kLines, int kChunks, int kThreads>
struct Copies
{
    static constexpr int kCount{kLines * kChunks / kThreads};
    static constexpr int kStep{kThreads / kChunks};

    int firstLine;
    int chunk;
    std::int32_t chunksOfLine; ///< In global memory.
    char const* lines[kCount]; ///< Null where there is no such line: zeros are written.

    __device__ explicit Copies(std::int32_t chunksOfLine_)
        : firstLine{static_cast<int>(threadIdx.x) / kChunks}
        , chunk{static_cast<int>(threadIdx.x) % kChunks}
        , chunksOfLine{chunksOfLine_}
    {
    }

    __device__ void start(char* shared, std::int32_t stage, char const* anywhere) const
    {
        std::int32_t const from = stage * kChunks + chunk;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
        {
            bool const present = lines[i] != nullptr && from < chunksOfLine;
            char const* const source = present ? lines[i] + 16 * static_cast<std::int64_t>(from) : anywhere;
            ptx::copyAsync(shared + placeOf<kLines>(firstLine + i * kStep, chunk), source, present);
        }
    }
};

/// Multiplies one stage. A warp has 32 rows and 64 rows of the matrix, the latter as two halves of 32. Of a half, sums
/// number 4 · half + j of a lane are of columns 8 · quad + 2 · j and the next one: eight neighbours in all.
template <typename T, Format kFormat, typename Tile>
__device__ void multiplyStage(
    SumOf<kFormat> (&sums)[2][8][4], char const* inputs, char const* weights, int warpDown, int warpAcross)
{
    constexpr int kWeightBlocks = kFormat == Format::kInt8Weight ? 1 : 2;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const group = lane / 4;
    int const quad = lane % 4;
#pragma unroll
    for (int block = 0; block < kWeightBlocks; ++block)
    {
        Vector rows[kParts<kFormat>][2][2];
#pragma unroll
        for (int part = 0; part < kParts<kFormat>; ++part)
        {
            int const chunk = 4 * block + inputChunk<kFormat>(quad, part);
#pragma unroll
            for (int i = 0; i < 2; ++i)
            {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                {
                    int const line = 32 * warpDown + 16 * i + 8 * half + group;
                    rows[part][i][half] = *reinterpret_cast<Vector const*>(inputs + placeOf<Tile::kRows>(line, chunk));
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j)
        {
            int const line = 64 * warpAcross + 32 * (j / 4) + 8 * (group / 2) + 2 * (j % 4) + group % 2;
            Vector const weight
                = *reinterpret_cast<Vector const*>(weights + placeOf<Tile::kWeightRows>(line, 4 * block + quad));
#pragma unroll
            for (int part = 0; part < kParts<kFormat>; ++part)
            {
                Vector operand;
                operandOfWeight<T, kFormat>(operand, weight, part);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                {
                    multiply<T, kFormat>(sums[i][j], rows[part][i][0], rows[part][i][1], operand);
                }
            }
        }
    }
}

/// Scales, gates and scatters a warp's sums. `rows` and `count` are what the list has from the tile's first row on.
template <typename T, Format kFormat, bool kGated>
__device__ void storeTile(Step const& step, StepExpert const& expert, std::int32_t const* rows, std::int32_t count,
    SumOf<kFormat> const (&sums)[2][8][4], int firstLine, std::int32_t firstColumn)
{
    int const lane = static_cast<int>(threadIdx.x) % 32;
    int const group = lane / 4;
    int const quad = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
    {
        int const line = firstLine + 8 * i + group;
        if (line >= count)
        {
            continue;
        }
        std::int32_t const row = rows[line];
#pragma unroll
        for (int half = 0; half < (kGated ? 1 : 2); ++half)
        {
            std::int32_t const column = firstColumn + 32 * half + 8 * quad;
            if (column >= step.out)
            {
                continue;
            }
            float values[8];
#pragma unroll
            for (int k = 0; k < 8; ++k)
            {
                auto const& of = sums[i / 2];
                int const place = 2 * (i % 2) + k % 2;
                values[k] = dequantize<kFormat>(expert, column + k, of[4 * half + k / 2][place]);
                if constexpr (kGated)
                {
                    values[k]
                        = gated(values[k], dequantize<kFormat>(expert, step.out + column + k, of[4 + k / 2][place]));
                }
            }
            storeEight<T, kGated>(expert, row, column, values);
        }
    }
}

template <typename T, Format kFormat, bool kGated, typename Tile>
__device__ void prefillTile(Step const& step, TilePlace const& place, char* shared)
{
    constexpr int kInputChunks = Tile::kLineBytes / 16;
    constexpr int kWeightChunks = kFormat == Format::kInt8Weight ? kInputChunks / 2 : kInputChunks;
    StepExpert const& expert = step.experts[place.expert];
    std::int32_t const* const rows = step.routing.list(place.expert) + place.firstRow;

    std::int64_t const weightStride = static_cast<std::int64_t>(step.in) * kWeightBytes<kFormat>;
    Copies<Tile::kRows, kInputChunks, Tile::kThreads> inputs{step.in * kInputBytes<kFormat> / 16};
    Copies<Tile::kWeightRows, kWeightChunks, Tile::kThreads> weights{step.in * kWeightBytes<kFormat> / 16};
#pragma unroll
    for (int i = 0; i < inputs.kCount; ++i)
    {
        int const line = inputs.firstLine + i * inputs.kStep;
        inputs.lines[i] = line < place.rows ? expert.input + rows[line] * expert.inputStride : nullptr;
    }
#pragma unroll
    for (int i = 0; i < weights.kCount; ++i)
    {
        int const line = weights.firstLine + i * weights.kStep;
        int const column = kGated ? line / 64 * 32 + line % 32 : line;
        std::int64_t const matrix = kGated && line / 32 % 2 == 1 ? step.out : 0;
        weights.lines[i] = place.firstColumn + column < step.out
            ? expert.weight + (matrix + place.firstColumn + column) * weightStride
            : nullptr;
    }

    std::int32_t const stages = (inputs.chunksOfLine + kInputChunks - 1) / kInputChunks;
    auto const start = [&](std::int32_t stage) {
        if (stage < stages)
        {
            char* const target = shared + stage % Tile::kStages * Tile::kStageBytes;
            inputs.start(target, stage, expert.weight);
            weights.start(target + Tile::kRows * Tile::kLineBytes, stage, expert.weight);
        }
        ptx::commitCopies();
    };
    int const warp = static_cast<int>(threadIdx.x) / 32;
    int const warpDown = warp / Tile::kAcross;
    int const warpAcross = warp % Tile::kAcross;
    SumOf<kFormat> sums[2][8][4]{};
    for (int stage = 0; stage < Tile::kStages - 1; ++stage)
    {
        start(stage);
    }
    for (std::int32_t stage = 0; stage < stages; ++stage)
    {
        ptx::waitCopies<Tile::kStages - 2>();
        // Now all threads' copies for this stage are there, and all threads are done with the stage before it, whose
        // place the next copies take.
        __syncthreads();
        start(stage + Tile::kStages - 1);
        char const* const source = shared + stage % Tile::kStages * Tile::kStageBytes;
        if (32 * warpDown < place.rows)
        {
            multiplyStage<T, kFormat, Tile>(
                sums, source, source + Tile::kRows * Tile::kLineBytes, warpDown, warpAcross);
        }
    }
    // The next tile's first copies must not overtake a warp that still multiplies.
    __syncthreads();
    std::int32_t const firstColumn = place.firstColumn + warpAcross * (kGated ? 32 : 64);
    storeTile<T, kFormat, kGated>(step, expert, rows, place.rows, sums, 32 * warpDown, firstColumn);
}

template <typename T, bool kGated, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) prefillKernel(__grid_constant__ Step const step)
{
    forEachTile(step, Tile::kRows, Tile::template kColumns<kGated>, [&](TilePlace const& place) {
        withFormat(step.experts[place.expert].format, [&](auto format) {
            prefillTile<T, decltype(format)::value, kGated, Tile>(step, place, ptx::dynamicShared());
        });
    });
}

} // namespace monoedge
