// A CUDA driver of as many functions as the doctor asks: one GPU, whose memory is the host's. Environment variables say
// what it is.

#include <stdlib.h>
#include <string.h>

static int number(char const* name, int otherwise)
{
    char const* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags)
{
    int status = number("DRIVER_STATUS", 0);
    if (status < 0)
    {
        abort();
    }
    return status;
}

int cuDriverGetVersion(int* version)
{
    *version = number("DRIVER_CUDA", 13000);
    return 0;
}

int cuGetErrorName(int status, char const** name)
{
    *name = status == 34 ? "CUDA_ERROR_STUB_LIBRARY" : status == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_OTHER";
    return 0;
}

int cuDeviceGetCount(int* count)
{
    *count = 1;
    return 0;
}

int cuDeviceGet(int* device, int index)
{
    *device = index;
    return 0;
}

int cuDeviceGetName(char* name, int size, int device)
{
    strncpy(name, "GPU of a test", size);
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    int capability = number("DRIVER_SM", 89);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device)
{
    *context = (void*)1;
    return number("DRIVER_CONTEXT", 0);
}

int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void* context) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return 0; }
int cuCtxSynchronize(void) { return 0; }

int cuMemGetInfo_v2(size_t* free, size_t* total)
{
    *free = (size_t)number("DRIVER_FREE", 4) << 20;
    *total = (size_t)8 << 30;
    return 0;
}

int cuMemAlloc_v2(unsigned long long* address, size_t size)
{
    *address = (unsigned long long)malloc(size);
    return 0;
}

int cuMemFree_v2(unsigned long long address)
{
    free((void*)address);
    return 0;
}

int cuMemcpyDtoDAsync_v2(unsigned long long target, unsigned long long source, size_t size, void* stream)
{
    memcpy((void*)target, (void*)source, size);
    return 0;
}
