// One device, its primary context, and the stack of contexts that each thread has.
#include "driver.h"

#include <stdio.h>
#include <string.h>

enum
{
    VERSION = 13000,
    MAJOR = 8,
    MINOR = 9,
    DEEPEST = 64
};

static struct CUctx_st primary;
static __thread CUcontext stack[DEEPEST];
static __thread int depth;

CUcontext current_context(void)
{
    return depth ? stack[depth - 1] : NULL;
}

CUresult cuInit(unsigned flags)
{
    BEGIN(NOTHING);
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version)
{
    BEGIN(NOTHING);
    *version = VERSION;
    return CUDA_SUCCESS;
}

// The device ----------------------------------------------------------------------------------------------------------
CUresult cuDeviceGet(CUdevice* device, int ordinal)
{
    BEGIN(NOTHING);
    *device = 0;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetCount(int* count)
{
    BEGIN(NOTHING);
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device)
{
    BEGIN(NOTHING);
    snprintf(name, (size_t)size, "memory of the host");
    return CUDA_SUCCESS;
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device)
{
    BEGIN(NOTHING);
    *major = MAJOR;
    *minor = MINOR;
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* size, CUdevice device)
{
    BEGIN(NOTHING);
    *size = memory_total;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device)
{
    BEGIN(NOTHING);
    memset(uuid, 7, sizeof *uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device)
{
    static struct
    {
        int attribute, value;
    } const known[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, MAJOR},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, MINOR},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 4},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 99 << 10},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 100 << 10},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
        {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 1536},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
        {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
        {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
        {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 32 << 20},
        {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 2000000},
        {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 10000000},
        {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 384},
        {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
        {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
        {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 1},
        {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
        {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
        {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 2147483647},
    };
    BEGIN(NOTHING);
    *value = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    {
        if (known[i].attribute == (int)attribute)
        {
            *value = known[i].value;
        }
    }
    return CUDA_SUCCESS;
}

// The primary context -------------------------------------------------------------------------------------------------
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device)
{
    BEGIN(NOTHING);
    lock();
    primary.alive = true;
    alive[RETAINS]++;
    unlock();
    *context = &primary;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    BEGIN(NOTHING);
    lock();
    bool const retained = alive[RETAINS] > 0;
    if (retained)
    {
        primary.alive = --alive[RETAINS] > 0;
    }
    unlock();
    if (!retained)
    {
        complain(__func__, "the context is not retained");
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    return CUDA_SUCCESS;
}

/// What PyCUDA calls when it collects a primary context; a driver accepts only contexts that were created.
CUresult cuCtxDetach(CUcontext context)
{
    BEGIN(NOTHING);
    complain(__func__, "a primary context is released, not detached");
    return CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active)
{
    BEGIN(NOTHING);
    *flags = 0;
    *active = primary.alive;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned flags)
{
    BEGIN(NOTHING);
    return CUDA_SUCCESS;
}

// The stack of a thread -----------------------------------------------------------------------------------------------
static void set_depth(int value)
{
    lock();
    alive[PUSHED] += value - depth;
    unlock();
    depth = value;
}

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    BEGIN(NOTHING);
    if (context == NULL || !context->alive || depth == DEEPEST)
    {
        complain(__func__, context == NULL ? "no context" : context->alive ? "the stack is full" : "it is destroyed");
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    stack[depth] = context;
    set_depth(depth + 1);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context)
{
    BEGIN(NOTHING);
    if (depth == 0)
    {
        complain(__func__, "the stack is empty");
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (context != NULL)
    {
        *context = current_context();
    }
    set_depth(depth - 1);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context)
{
    BEGIN(NOTHING);
    *context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    BEGIN(NOTHING);
    if (context == NULL)
    {
        set_depth(depth ? depth - 1 : 0);
        return CUDA_SUCCESS;
    }
    if (depth == 0)
    {
        set_depth(1);
    }
    stack[depth - 1] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device)
{
    BEGIN(CONTEXT);
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetFlags(unsigned* flags)
{
    BEGIN(CONTEXT);
    *flags = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetApiVersion(CUcontext context, unsigned* version)
{
    BEGIN(NOTHING);
    *version = 3020;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest)
{
    BEGIN(CONTEXT);
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit)
{
    BEGIN(CONTEXT);
    *value = 1024;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value)
{
    BEGIN(CONTEXT);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id)
{
    BEGIN(NOTHING);
    *id = 1;
    return CUDA_SUCCESS;
}
