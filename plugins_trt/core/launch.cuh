// Chooses the kernel of a step and the size of its grid.

#pragma once

#include "decode.cuh"
#include "enqueue.cuh"
#include "generic.cuh"
#include "prefill.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace monoedge
{

enum class Path
{
    kDecode,
    kPrefill,
    kGeneric,
};

inline dim3 gridOf(std::int64_t tiles, int most)
{
    return dim3(static_cast<unsigned>(std::clamp<std::int64_t>(tiles, 1, most)));
}

template <typename T, bool kGated>
cudaError_t launchDecode(Step const& step, cudaStream_t stream)
{
    constexpr int kColumns = DecodeTile::kColumns<kGated>;
    dim3 const grid(static_cast<unsigned>((step.out + kColumns - 1) / kColumns), kExperts);
    auto const& [text, visual] = step.experts;
    int const parts = text.format == Format::kInt8Weight || visual.format == Format::kInt8Weight ? 2 : 1;
    int const rowTiles = step.rows <= 8 ? 1 : 2;
    auto* const kernel = rowTiles == 1 ? decodeKernel<T, kGated, 1> : decodeKernel<T, kGated, 2>;
    return launch(kernel, grid, DecodeTile::kThreads, DecodeTile::sharedBytes(rowTiles, parts), stream, step);
}

template <typename T, bool kGated, typename Tile>
cudaError_t launchPrefill(Step const& step, std::int64_t tiles, int most, cudaStream_t stream)
{
    return launch(
        prefillKernel<T, kGated, Tile>, gridOf(tiles, most), Tile::kThreads, Tile::kSharedBytes, stream, step);
}

template <typename T, bool kGated>
cudaError_t launchStep(Step const& step, Path path, cudaStream_t stream)
{
    if (path == Path::kDecode)
    {
        return launchDecode<T, kGated>(step, stream);
    }
    int device = 0;
    int processors = 0;
    MONOEDGE_CHECK(cudaGetDevice(&device));
    MONOEDGE_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    if (path == Path::kGeneric)
    {
        constexpr int kBlocksOfProcessor{4};
        std::int64_t const tiles = mostTiles(step.rows, step.out, GenericTile::kRows, GenericTile::kColumns);
        return launch(genericKernel<T, kGated>, gridOf(tiles, kBlocksOfProcessor * processors), GenericTile::kThreads,
            0, stream, step);
    }
    auto const tilesOf
        = [&](auto tile) { return mostTiles(step.rows, step.out, tile.kRows, tile.template kColumns<kGated>); };
    std::int64_t const largeTiles = tilesOf(LargeTile{});
    if (largeTiles >= processors)
    {
        return launchPrefill<T, kGated, LargeTile>(step, largeTiles, processors, stream);
    }
    // Too few large tiles for the device. Two small ones fit into a processor's shared memory everywhere.
    return launchPrefill<T, kGated, SmallTile>(step, tilesOf(SmallTile{}), 2 * processors, stream);
}

} // namespace monoedge
