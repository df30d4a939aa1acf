// Stands in for CUDA's header of this name when the kernels are compiled for a CPU: see blocks.h.

#pragma once

#include <cstddef>

enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorLaunchOutOfResources = 701,
};

enum cudaFuncAttribute
{
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};

enum cudaDeviceAttr
{
    cudaDevAttrMultiProcessorCount = 16,
};

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*; ///< TensorRT's headers name it.

struct uint2
{
    unsigned x;
    unsigned y;
};

struct dim3
{
    unsigned x;
    unsigned y;
    unsigned z;

    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
        : x{x_}
        , y{y_}
        , z{z_}
    {
    }
};

inline char const* cudaGetErrorName(cudaError_t status)
{
    switch (status)
    {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorUnsupportedPtxVersion: return "cudaErrorUnsupportedPtxVersion";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    }
    return "unrecognized error code";
}

inline char const* cudaGetErrorString(cudaError_t)
{
    return "emulated";
}
