// Calls by name, and what errors are called.
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/// What calls answer that the generated stubs stand for.
CUresult fake_unimplemented(char const* function)
{
    complain(function, "tests/cuda_driver has no such call");
    return CUDA_ERROR_NOT_SUPPORTED;
}

static void* exported(char const* name)
{
    for (char const* const* stub = unimplemented; *stub; ++stub)
    {
        if (strcmp(name, *stub) == 0)
        {
            return NULL;
        }
    }
    Dl_info self;
    dladdr((void*)&cuInit, &self);
    void* const library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void* const address = dlsym(library, name);
    dlclose(library);
    return address;
}

static void* find(char const* name)
{
    // NVIDIA's header gives this name to the other call.
    char const* const plain = strcmp(name, "cuGraphInstantiate") == 0 ? "cuGraphInstantiateWithFlags" : name;
    for (int version = 4; version >= 2; --version)
    {
        char versioned[128];
        snprintf(versioned, sizeof versioned, "%s_v%d", plain, version);
        void* const address = exported(versioned);
        if (address)
        {
            return address;
        }
    }
    return exported(plain);
}

CUresult cuGetProcAddress_v2(
    char const* name, void** address, int version, cuuint64_t flags, CUdriverProcAddressQueryResult* status)
{
    *address = is_hidden(name) ? NULL : find(name);
    if (status)
    {
        *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    }
    return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

static struct
{
    CUresult error;
    char const *name, *text;
} const errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        "operation failed due to a previous error during capture"},
};

static CUresult describe(CUresult error, char const** name, char const** text)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; ++i)
    {
        if (errors[i].error == error)
        {
            *name = errors[i].name;
            *text = errors[i].text;
            return CUDA_SUCCESS;
        }
    }
    *name = "CUDA_ERROR_OF_ANOTHER_KIND";
    *text = "unrecognized error code";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, char const** name)
{
    char const* text;
    return describe(error, name, &text);
}

CUresult cuGetErrorString(CUresult error, char const** text)
{
    char const* name;
    return describe(error, &name, text);
}
