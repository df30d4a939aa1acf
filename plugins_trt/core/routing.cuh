// Finds on the device which rows belong to which expert, and makes the int8 rows of experts that take them.

#pragma once

#include "step.cuh"

namespace monoedge
{

constexpr int kRouteThreads{1024};
constexpr int kQuantizeThreads{256};

/// Lists the rows of each expert in rising order. One block: of 4096 rows each thread looks at four.
__global__ void __launch_bounds__(kRouteThreads) routeKernel(bool const* visualMask, std::int32_t rows, Routing routing)
{
    __shared__ std::int32_t visualsOfWarp[kRouteThreads / 32];
    auto const thread = static_cast<std::int32_t>(threadIdx.x);
    int const lane = thread % 32;
    int const warp = thread / 32;
    std::int32_t visualsBefore = 0;
    for (std::int32_t first = 0; first < rows; first += kRouteThreads)
    {
        std::int32_t const row = first + thread;
        bool const isVisual = row < rows && visualMask[row];
        std::uint32_t const visuals = __ballot_sync(~0U, isVisual);
        if (lane == 0)
        {
            visualsOfWarp[warp] = __popc(visuals);
        }
        __syncthreads();
        std::int32_t place = visualsBefore + __popc(visuals & ((1U << lane) - 1U));
        for (int other = 0; other < kRouteThreads / 32; ++other)
        {
            place += other < warp ? visualsOfWarp[other] : 0;
            visualsBefore += visualsOfWarp[other];
        }
        if (row < rows)
        {
            // Of the rows before this one, `place` are visual and the others text.
            routing.rows[isVisual ? routing.capacity + static_cast<std::int64_t>(place) : row - place] = row;
        }
        __syncthreads();
    }
    if (thread == 0)
    {
        routing.counts[0] = rows - visualsBefore;
        routing.counts[1] = visualsBefore;
    }
}

struct QuantizeRows
{
    void const* source; ///< [rows, width], 16 bits
    std::int8_t* target; ///< [rows, width]
    bool const* visualMask;
    float const* inputScales[kExperts]; ///< [1] each; null where the expert takes rows as they are.
    std::int32_t width;
};

/// Writes row blockIdx.x in int8, if its expert takes int8.
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads) quantizeKernel(__grid_constant__ QuantizeRows const params)
{
    float const* const scale = params.inputScales[params.visualMask[blockIdx.x] ? 1 : 0];
    if (scale == nullptr)
    {
        return;
    }
    std::int64_t const first = static_cast<std::int64_t>(blockIdx.x) * params.width;
    auto const* const source = static_cast<std::uint16_t const*>(params.source) + first;
    for (auto i = static_cast<std::int32_t>(threadIdx.x); i < params.width; i += kQuantizeThreads)
    {
        params.target[first + i] = static_cast<std::int8_t>(quantize(T::toFloat(source[i]), *scale));
    }
}

} // namespace monoedge
