// Resizes in two directions, with one thread for each value of each result.

#include "preprocess.h"

#include "enqueue.cuh"

#include <algorithm>

namespace monoedge
{

namespace
{

constexpr int kResizeThreads{256};
constexpr int kChannels{3};
constexpr int kLevels{256};
constexpr int kWeightBits{22};

/// The longest side: places of pixels fit into 32 bits.
constexpr std::int64_t kMostOfASide{1 << 20};
constexpr std::int64_t kMostBlocksDown{65535};

/// A picture, and the filter that resizes it in one direction.
struct ResizePass
{
    std::uint8_t const* source;
    std::int64_t rowStride;
    std::int64_t pixelStride;
    std::int64_t channelStride;
    ResizeFilter filter;
    std::int32_t isAcross;
    std::int32_t width; ///< Of the result, as the next.
    std::int32_t height;

    /// The value at a place of the result, rounded and clipped.
    __device__ int at(std::int32_t x, std::int32_t y, std::int32_t channel) const
    {
        std::int32_t const place = isAcross ? x : y;
        std::int64_t const stride = isAcross ? pixelStride : rowStride;
        std::uint8_t const* const from = source + channel * channelStride
            + (isAcross ? y * rowStride : x * pixelStride) + filter.first[place] * stride;
        std::int32_t const* const weights = filter.weights + static_cast<std::int64_t>(place) * filter.taps;
        std::int32_t sum = 1 << (kWeightBits - 1);
        for (std::int32_t i = 0; i < filter.count[place]; ++i)
        {
            sum += weights[i] * from[i * stride];
        }
        std::int32_t const value = sum >> kWeightBits;
        return value < 0 ? 0 : value >= kLevels ? kLevels - 1 : value;
    }
};

/// Into a picture [height, width, 3].
__global__ void __launch_bounds__(kResizeThreads)
    resizeKernel(__grid_constant__ ResizePass const pass, std::uint8_t* target)
{
    auto const place = static_cast<std::int32_t>(blockIdx.x * kResizeThreads + threadIdx.x);
    if (place >= pass.width * kChannels)
    {
        return;
    }
    for (auto y = static_cast<std::int32_t>(blockIdx.y); y < pass.height; y += static_cast<std::int32_t>(gridDim.y))
    {
        int const value = pass.at(place / kChannels, y, place % kChannels);
        target[static_cast<std::int64_t>(y) * pass.width * kChannels + place] = static_cast<std::uint8_t>(value);
    }
}

/// Into tiles [.., 3, size, size], each value as its level.
template <typename Element>
__global__ void __launch_bounds__(kResizeThreads) tileKernel(
    __grid_constant__ ResizePass const pass, Element const* levels, Element* tiles, std::int32_t size)
{
    auto const x = static_cast<std::int32_t>(blockIdx.x * kResizeThreads + threadIdx.x);
    auto const channel = static_cast<std::int32_t>(blockIdx.z);
    if (x >= pass.width)
    {
        return;
    }
    for (auto y = static_cast<std::int32_t>(blockIdx.y); y < pass.height; y += static_cast<std::int32_t>(gridDim.y))
    {
        std::int64_t const tile = y / size * (pass.width / size) + x / size;
        std::int64_t const line = (tile * kChannels + channel) * size + y % size;
        tiles[line * size + x % size] = levels[channel * kLevels + pass.at(x, y, channel)];
    }
}

bool isSide(std::int64_t size)
{
    return size > 0 && size <= kMostOfASide;
}

dim3 blocksFor(std::int64_t places, std::int64_t lines, unsigned deep)
{
    return dim3(static_cast<unsigned>((places + kResizeThreads - 1) / kResizeThreads),
        static_cast<unsigned>(std::min(lines, kMostBlocksDown)), deep);
}

template <typename Element>
cudaError_t launchTiles(ResizeParams const& params, ResizePass const& pass, cudaStream_t stream)
{
    return launch(tileKernel<Element>, blocksFor(pass.width, pass.height, kChannels), kResizeThreads, 0, stream, pass,
        static_cast<Element const*>(params.levels), static_cast<Element*>(params.tiles), params.tileSize);
}

} // namespace

int monoedgeResizeToTiles(ResizeParams const* given, cudaStream_t stream)
{
    ResizeParams const& params = *given;
    std::int64_t const width = static_cast<std::int64_t>(params.columns) * params.tileSize;
    std::int64_t const height = static_cast<std::int64_t>(params.rows) * params.tileSize;
    if (!isSide(params.tileSize) || !isSide(params.columns) || !isSide(params.rows) || !isSide(width)
        || !isSide(height) || !isSide(params.width) || !isSide(params.height)
        || (params.elementSize != 2 && params.elementSize != 4))
    {
        return cudaErrorInvalidValue;
    }
    bool const acrossFirst = params.acrossFirst != 0;
    ResizePass first{params.frame, params.rowStride, params.pixelStride, params.channelStride,
        acrossFirst ? params.across : params.down, acrossFirst,
        static_cast<std::int32_t>(acrossFirst ? width : params.width),
        static_cast<std::int32_t>(acrossFirst ? params.height : height)};
    std::int64_t const line = static_cast<std::int64_t>(first.width) * kChannels;
    if (params.workspaceSize < static_cast<std::size_t>(line * first.height))
    {
        return cudaErrorInvalidValue;
    }
    ResizePass const second{params.workspace, line, kChannels, 1, acrossFirst ? params.down : params.across,
        !acrossFirst, static_cast<std::int32_t>(width), static_cast<std::int32_t>(height)};
    MONOEDGE_CHECK(launch(
        resizeKernel, blocksFor(line, first.height, 1), kResizeThreads, 0, stream, first, params.workspace));
    return params.elementSize == 2 ? launchTiles<std::uint16_t>(params, second, stream)
                                   : launchTiles<std::uint32_t>(params, second, stream);
}

} // namespace monoedge
