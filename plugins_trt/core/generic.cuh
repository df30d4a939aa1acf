// The path for any sizes and alignments: tiles in shared memory, one element at a time, no tensor cores.

#pragma once

#include "tiles.cuh"

namespace monoedge
{

struct GenericTile
{
    static constexpr int kThreads{256};
    static constexpr int kRows{32};
    static constexpr int kColumns{32};
    static constexpr int kDepth{16};
    static constexpr int kRowsOfThread{kRows * kColumns / kThreads};
};

/// Element `index` behind `base`, as what it is summed in.
template <typename T, typename Sum, int kBytes>
__device__ Sum elementAt(char const* base, std::int64_t index)
{
    if constexpr (kBytes == 1)
    {
        return static_cast<Sum>(reinterpret_cast<std::int8_t const*>(base)[index]);
    }
    else
    {
        return T::toFloat(reinterpret_cast<std::uint16_t const*>(base)[index]);
    }
}

template <typename T, Format kFormat, bool kGated>
__device__ void genericTile(Step const& step, TilePlace const& place)
{
    using Sum = SumOf<kFormat>;
    using Tile = GenericTile;
    constexpr int kMatrices = kGated ? 2 : 1;
    __shared__ Sum inputs[Tile::kRows][Tile::kDepth + 1];
    __shared__ Sum weights[kMatrices][Tile::kColumns][Tile::kDepth + 1];
    StepExpert const& expert = step.experts[place.expert];
    std::int32_t const* const rows = step.routing.list(place.expert) + place.firstRow;
    auto const thread = static_cast<int>(threadIdx.x);
    int const column = thread % Tile::kColumns;
    int const firstRow = thread / Tile::kColumns * Tile::kRowsOfThread;
    Sum sums[Tile::kRowsOfThread][kMatrices]{};
    for (std::int32_t depth = 0; depth < step.in; depth += Tile::kDepth)
    {
        for (int i = thread; i < Tile::kRows * Tile::kDepth; i += Tile::kThreads)
        {
            int const line = i / Tile::kDepth;
            std::int32_t const k = depth + i % Tile::kDepth;
            bool const inside = k < step.in;
            inputs[line][i % Tile::kDepth] = inside && line < place.rows
                ? elementAt<T, Sum, kInputBytes<kFormat>>(expert.input + rows[line] * expert.inputStride, k)
                : Sum{};
            for (int matrix = 0; matrix < kMatrices; ++matrix)
            {
                std::int64_t const weightRow = static_cast<std::int64_t>(matrix) * step.out + place.firstColumn + line;
                weights[matrix][line][i % Tile::kDepth] = inside && place.firstColumn + line < step.out
                    ? elementAt<T, Sum, kWeightBytes<kFormat>>(expert.weight, weightRow * step.in + k)
                    : Sum{};
            }
        }
        __syncthreads();
        for (int k = 0; k < Tile::kDepth; ++k)
        {
            for (int matrix = 0; matrix < kMatrices; ++matrix)
            {
                Sum const weight = weights[matrix][column][k];
                for (int i = 0; i < Tile::kRowsOfThread; ++i)
                {
                    sums[i][matrix] += inputs[firstRow + i][k] * weight;
                }
            }
        }
        __syncthreads();
    }
    std::int32_t const weightRow = place.firstColumn + column;
    for (int i = 0; i < Tile::kRowsOfThread && weightRow < step.out && firstRow + i < place.rows; ++i)
    {
        float value = dequantize<kFormat>(expert, weightRow, sums[i][0]);
        if constexpr (kGated)
        {
            value = gated(value, dequantize<kFormat>(expert, step.out + weightRow, sums[i][1]));
        }
        store<T, kGated>(expert, rows[firstRow + i], weightRow, value);
    }
}

template <typename T, bool kGated>
__global__ void __launch_bounds__(GenericTile::kThreads, 2) genericKernel(__grid_constant__ Step const step)
{
    forEachTile(step, GenericTile::kRows, GenericTile::kColumns, [&](TilePlace const& place) {
        withFormat(step.experts[place.expert].format,
            [&](auto format) { genericTile<T, decltype(format)::value, kGated>(step, place); });
    });
}

} // namespace monoedge
