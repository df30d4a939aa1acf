// Memory of the device and page-locked memory of the host, all of it from the host.
#include "driver.h"

#include <stdlib.h>
#include <string.h>

enum
{
    ALIGNMENT = 512,
    POISON = 0xFF // NaN in every format
};

struct Block
{
    char* begin;
    size_t size;
    enum Kind kind;
    struct Block* next;
};

size_t memory_total = (size_t)8 << 30;
static struct Block* blocks;

static struct Block* find(void const* address, size_t size)
{
    for (struct Block* block = blocks; block; block = block->next)
    {
        if ((char const*)address >= block->begin && (char const*)address + size <= block->begin + block->size)
        {
            return block;
        }
    }
    return NULL;
}

bool is_allocated(void const* address, size_t size)
{
    lock();
    bool const found = find(address, size) != NULL;
    unlock();
    return found;
}

static CUresult allocate(void** address, size_t size, enum Kind kind)
{
    if (size == 0)
    {
        return CUDA_ERROR_INVALID_VALUE;
    }
    lock();
    struct Block* const block = malloc(sizeof *block);
    bool const fits = kind == HOST_BYTES || (size_t)alive[DEVICE_BYTES] + size <= memory_total;
    if (!fits || posix_memalign(address, ALIGNMENT, size) != 0)
    {
        free(block);
        unlock();
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset(*address, POISON, size);
    *block = (struct Block){*address, size, kind, blocks};
    blocks = block;
    alive[kind] += (long)size;
    unlock();
    return CUDA_SUCCESS;
}

static CUresult release(char const* function, void const* address, enum Kind kind)
{
    lock();
    struct Block** at = &blocks;
    while (*at && ((*at)->begin != address || (*at)->kind != kind))
    {
        at = &(*at)->next;
    }
    struct Block* const block = *at;
    if (block == NULL)
    {
        unlock();
        complain(function, "%p is not the begin of such memory", address);
        return CUDA_ERROR_INVALID_VALUE;
    }
    *at = block->next;
    alive[kind] -= (long)block->size;
    memset(block->begin, POISON, block->size);
    if (is_in_use(block->begin, block->size))
    {
        // Not given back to the host, since that work will still touch it.
        complain(function, "freed before work that uses it");
    }
    else
    {
        free(block->begin);
    }
    free(block);
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* unused, size_t* total)
{
    BEGIN(CONTEXT);
    *total = memory_total;
    *unused = memory_total > (size_t)alive[DEVICE_BYTES] ? memory_total - (size_t)alive[DEVICE_BYTES] : 0;
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t size)
{
    BEGIN(CONTEXT | SAFETY);
    return allocate((void**)address, size, DEVICE_BYTES);
}

CUresult cuMemFree_v2(CUdeviceptr address)
{
    BEGIN(CONTEXT | SAFETY);
    return address ? release(__func__, (void const*)address, DEVICE_BYTES) : CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** address, size_t size, unsigned flags)
{
    BEGIN(CONTEXT | SAFETY);
    return allocate(address, size, HOST_BYTES);
}

CUresult cuMemAllocHost_v2(void** address, size_t size)
{
    BEGIN(CONTEXT | SAFETY);
    return allocate(address, size, HOST_BYTES);
}

CUresult cuMemFreeHost(void* address)
{
    BEGIN(CONTEXT | SAFETY);
    return release(__func__, address, HOST_BYTES);
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* address, unsigned flags)
{
    BEGIN(CONTEXT);
    *device = (CUdeviceptr)address;
    return is_allocated(address, 1) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemHostGetFlags(unsigned* flags, void* address)
{
    BEGIN(CONTEXT);
    *flags = 0;
    return is_allocated(address, 1) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* first, size_t* size, CUdeviceptr address)
{
    BEGIN(CONTEXT);
    lock();
    struct Block const* const block = find((void const*)address, 1);
    if (block && first)
    {
        *first = (CUdeviceptr)block->begin;
    }
    if (block && size)
    {
        *size = block->size;
    }
    unlock();
    return block ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address)
{
    BEGIN(CONTEXT);
    lock();
    struct Block const* const block = find((void const*)address, 1);
    unlock();
    if (block == NULL)
    {
        return CUDA_ERROR_INVALID_VALUE;
    }
    switch (attribute)
    {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned*)value = block->kind == HOST_BYTES ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int*)value = 0; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr*)value = address; return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}
