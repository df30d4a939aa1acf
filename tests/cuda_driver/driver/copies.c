// Copies and fills. What is asynchronous must name page-locked memory of the host; what is not waits for the default
// stream, and not for streams that were made to be left alone by it.
#include "driver.h"

static bool is_known(char const* function, char const* what, void const* address, size_t size, bool host)
{
    if (is_allocated(address, size))
    {
        return true;
    }
    complain(function, "%s: %zu bytes at %p are %s", what, size, address, host ? "pageable memory" : "not allocated");
    return host;
}

static size_t extent(size_t width, size_t pitch, size_t rows)
{
    return rows ? (rows - 1) * pitch + width : 0;
}

static CUresult start(
    char const* function, CUstream stream, struct Operation operation, bool from_host, bool to_host, bool synchronous)
{
    bool const source_checked = from_host && synchronous;
    bool const target_checked = to_host && synchronous;
    size_t const read = extent(operation.width, operation.source_pitch, operation.rows);
    size_t const written = extent(operation.width, operation.target_pitch, operation.rows);
    if ((!source_checked && operation.work == COPY && !is_known(function, "source", operation.source, read, from_host))
        || (!target_checked && !is_known(function, "target", operation.target, written, to_host)))
    {
        return CUDA_ERROR_INVALID_VALUE;
    }
    CUresult const result = enqueue(stream, &operation);
    if (synchronous)
    {
        drain_blocking();
    }
    return result;
}

static struct Operation copied(void* target, void const* source, size_t size)
{
    return (struct Operation){.work = COPY, .target = target, .source = source, .width = size, .rows = 1};
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, void const* source, size_t size, CUstream stream)
{
    BEGIN(CONTEXT);
    return start(__func__, stream, copied((void*)target, source, size), true, false, false);
}

CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t size, CUstream stream)
{
    BEGIN(CONTEXT);
    return start(__func__, stream, copied(target, (void const*)source, size), false, true, false);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream)
{
    BEGIN(CONTEXT);
    return start(__func__, stream, copied((void*)target, (void const*)source, size), false, false, false);
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream)
{
    BEGIN(CONTEXT);
    return start(__func__, stream, copied((void*)target, (void const*)source, size), true, true, false);
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr target, void const* source, size_t size)
{
    BEGIN(CONTEXT | SAFETY);
    return start(__func__, NULL, copied((void*)target, source, size), true, false, true);
}

CUresult cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t size)
{
    BEGIN(CONTEXT | SAFETY);
    return start(__func__, NULL, copied(target, (void const*)source, size), false, true, true);
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t size)
{
    BEGIN(CONTEXT | SAFETY);
    return start(__func__, NULL, copied((void*)target, (void const*)source, size), false, false, true);
}

CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t size)
{
    BEGIN(CONTEXT | SAFETY);
    return start(__func__, NULL, copied((void*)target, (void const*)source, size), true, true, true);
}

// Rows ----------------------------------------------------------------------------------------------------------------
static CUresult copy_rows(char const* function, CUDA_MEMCPY2D const* copy, CUstream stream, bool synchronous)
{
    bool const from_host = copy->srcMemoryType == CU_MEMORYTYPE_HOST;
    bool const to_host = copy->dstMemoryType == CU_MEMORYTYPE_HOST;
    size_t const source_pitch = copy->srcPitch ? copy->srcPitch : copy->WidthInBytes;
    size_t const target_pitch = copy->dstPitch ? copy->dstPitch : copy->WidthInBytes;
    if (source_pitch < copy->WidthInBytes || target_pitch < copy->WidthInBytes)
    {
        complain(function, "a pitch is less than the width");
        return CUDA_ERROR_INVALID_VALUE;
    }
    char const* const source = from_host ? copy->srcHost : (char const*)copy->srcDevice;
    char* const target = to_host ? copy->dstHost : (char*)copy->dstDevice;
    struct Operation const operation = {
        .work = COPY,
        .source = source + copy->srcY * source_pitch + copy->srcXInBytes,
        .target = target + copy->dstY * target_pitch + copy->dstXInBytes,
        .width = copy->WidthInBytes,
        .rows = copy->Height,
        .source_pitch = source_pitch,
        .target_pitch = target_pitch,
    };
    return start(function, stream, operation, from_host, to_host, synchronous);
}

CUresult cuMemcpy2DAsync_v2(CUDA_MEMCPY2D const* copy, CUstream stream)
{
    BEGIN(CONTEXT);
    return copy_rows(__func__, copy, stream, false);
}

CUresult cuMemcpy2D_v2(CUDA_MEMCPY2D const* copy)
{
    BEGIN(CONTEXT | SAFETY);
    return copy_rows(__func__, copy, NULL, true);
}

CUresult cuMemcpy2DUnaligned_v2(CUDA_MEMCPY2D const* copy)
{
    BEGIN(CONTEXT | SAFETY);
    return copy_rows(__func__, copy, NULL, true);
}

// Fills ---------------------------------------------------------------------------------------------------------------
static struct Operation filled(CUdeviceptr target, unsigned value, unsigned value_size, size_t count)
{
    return (struct Operation){.work = FILL,
        .target = (char*)target,
        .width = count * value_size,
        .rows = 1,
        .value = value,
        .value_size = value_size};
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream)
{
    BEGIN(CONTEXT);
    return start(__func__, stream, filled(target, value, 1, count), false, false, false);
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream)
{
    BEGIN(CONTEXT);
    return start(__func__, stream, filled(target, value, 4, count), false, false, false);
}

CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t count)
{
    BEGIN(CONTEXT | SAFETY);
    return start(__func__, NULL, filled(target, value, 1, count), false, false, true);
}
