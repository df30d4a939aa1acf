// Stands in for CUDA's header of this name when the kernels are compiled for a CPU: see blocks.h.

#pragma once

#include "cuda_runtime_api.h"

#include "blocks.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

inline float __uint_as_float(std::uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t __float_as_uint(float value)
{
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

/// Byte i of the result is byte (selector >> 4 · i) & 7 of b:a.
inline std::uint32_t __byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t selector)
{
    std::uint64_t const bytes = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
    {
        result |= static_cast<std::uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    }
    return result;
}

/// To nearest, ties to even; saturates, NaN becomes 0.
inline int __float2int_rn(float value)
{
    if (std::isnan(value))
    {
        return 0;
    }
    if (value >= 2147483648.0F)
    {
        return std::numeric_limits<int>::max();
    }
    return value <= -2147483648.0F ? std::numeric_limits<int>::min() : static_cast<int>(std::nearbyint(value));
}

inline float __expf(float value)
{
    return std::exp(value);
}

inline int __popc(std::uint32_t bits)
{
    return __builtin_popcount(bits);
}

inline int __ffs(int bits)
{
    return __builtin_ffs(bits);
}

inline void __syncthreads()
{
    emulation::block.synchronize();
}

inline std::uint32_t __ballot_sync(std::uint32_t, bool vote)
{
    auto const& votes = emulation::block.exchange(emulation::Collective::kBallot, vote);
    std::uint32_t result = 0;
    for (int lane = 0; lane < 32; ++lane)
    {
        result |= votes[lane].word << lane;
    }
    return result;
}

struct cudaLaunchConfig_t
{
    dim3 gridDim;
    dim3 blockDim;
    std::size_t dynamicSmemBytes{0};
    cudaStream_t stream{nullptr};
};

template <typename... Params, typename... Arguments>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Params...), Arguments... arguments)
{
    bool const possible = config->gridDim.y <= 65535 && config->gridDim.z <= 65535 && config->blockDim.x % 32 == 0
        && config->dynamicSmemBytes <= 99 * 1024;
    if (!possible)
    {
        return cudaErrorInvalidValue;
    }
    if (emulation::observer.launches++ == emulation::observer.failingLaunch)
    {
        return emulation::observer.failure;
    }
    emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
        [=] { kernel(static_cast<Params>(arguments)...); });
    return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute, int)
{
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int)
{
    *value = emulation::observer.processors;
    return cudaSuccess;
}
