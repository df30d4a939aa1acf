// Launches one kernel and returns the status.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace monoedge
{

#define MONOEDGE_CHECK(call)                                                                                           \
    do                                                                                                                 \
    {                                                                                                                  \
        if (cudaError_t const status = (call); status != cudaSuccess)                                                  \
        {                                                                                                              \
            return status;                                                                                             \
        }                                                                                                              \
    } while (false)

/// Returns the launch's own status. cudaGetLastError might report a call that somebody else made before.
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int sharedBytes, cudaStream_t stream,
    Params... params)
{
    if (sharedBytes > 48 * 1024)
    {
        MONOEDGE_CHECK(cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel),
            cudaFuncAttributeMaxDynamicSharedMemorySize, sharedBytes));
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(sharedBytes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, params...);
}

} // namespace monoedge
