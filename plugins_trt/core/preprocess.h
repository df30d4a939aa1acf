// Makes the tiles that the vision network reads from a picture in device memory, bit for bit as Pillow's bicubic
// filter.
//
// Pillow resizes 8-bit pictures in fixed point: in one direction, rounded to 8 bits, then in the other, rounded again.
// The caller makes the weights and knows the order (runtime/images/resampling.py), so nothing here is computed in
// floating point.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace monoedge
{

/// The weights of one direction. Place i of the result is made from `count[i]` places of the source, `first[i]` on.
struct ResizeFilter
{
    std::int32_t const* first;   ///< [places]
    std::int32_t const* count;   ///< [places]; at most `taps`.
    std::int32_t const* weights; ///< [places, taps], in steps of 2^-22.
    std::int32_t taps;
};

/// One picture, stretched over a grid of tiles. All pointers are device pointers.
struct ResizeParams
{
    std::uint8_t const* frame; ///< The first pixel's red.
    std::int64_t rowStride;    ///< In bytes, as the next two.
    std::int64_t pixelStride;
    std::int64_t channelStride;
    std::int32_t width;
    std::int32_t height;
    std::int32_t columns; ///< Tiles of the grid.
    std::int32_t rows;
    std::int32_t tileSize;
    std::int32_t acrossFirst; ///< Which direction comes first: 1 across, 0 down.
    ResizeFilter across;      ///< columns · tileSize places
    ResizeFilter down;        ///< rows · tileSize places
    void const* levels;       ///< [3, 256] elements: what each value of a channel becomes.
    std::int32_t elementSize; ///< 2 or 4 bytes.
    void* tiles;              ///< [rows · columns, 3, tileSize, tileSize] elements, row by row of the grid.
    std::uint8_t* workspace;
    std::size_t workspaceSize; ///< at least 3 times the pixels of the picture that is resized in the first direction
};

/// Enqueues it; found by name in the loaded library. Returns a cudaError_t: cudaErrorInvalidValue for sizes or a
/// workspace that cannot be, else the status of the launches.
extern "C" __attribute__((visibility("default"))) int monoedgeResizeToTiles(
    ResizeParams const* params, cudaStream_t stream);

} // namespace monoedge
