// Streams and events.
#include "driver.h"

#include <stdlib.h>

struct CUstream_st* streams;
static struct CUstream_st default_stream;

CUstream resolve(CUstream stream)
{
    bool const is_default = stream == NULL || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
    return is_default ? &default_stream : stream;
}

static struct CUstream_st** place_of(CUstream stream)
{
    struct CUstream_st** at = &streams;
    while (*at && *at != stream)
    {
        at = &(*at)->next;
    }
    return at;
}

// Streams -------------------------------------------------------------------------------------------------------------
CUresult cuStreamCreate(CUstream* stream, unsigned flags)
{
    BEGIN(CONTEXT | SAFETY);
    *stream = calloc(1, sizeof **stream);
    lock();
    (*stream)->flags = flags;
    (*stream)->next = streams;
    streams = *stream;
    alive[STREAMS]++;
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority)
{
    return cuStreamCreate(stream, flags);
}

CUresult cuStreamDestroy_v2(CUstream stream)
{
    BEGIN(CONTEXT | SAFETY);
    lock();
    struct CUstream_st** const at = place_of(stream);
    if (*at == NULL || stream->capture || stream->queue.first)
    {
        char const* const why = *at == NULL ? "no such stream" : stream->capture ? "it captures" : "it has work to do";
        unlock();
        complain(__func__, "%s", why);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *at = stream->next;
    alive[STREAMS]--;
    unlock();
    // Not given back to the host: another thread may be walking along the streams.
    return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream stream, unsigned* flags)
{
    BEGIN(CONTEXT);
    *flags = resolve(stream)->flags;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream stream, int* priority)
{
    BEGIN(CONTEXT);
    *priority = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context)
{
    BEGIN(CONTEXT);
    *context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream)
{
    BEGIN(CONTEXT | SAFETY);
    stream = resolve(stream);
    done[WAITS] += stream->queue.first != NULL;
    drain(stream);
    return CUDA_SUCCESS;
}

CUresult cuStreamQuery(CUstream stream)
{
    BEGIN(CONTEXT | SAFETY);
    // Who asks again and again makes the work go on.
    run_next(resolve(stream));
    return resolve(stream)->queue.first ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    BEGIN(CONTEXT);
    return enqueue(stream, &(struct Operation){.work = WAIT, .event = event, .stamp = event->wanted});
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data)
{
    BEGIN(CONTEXT);
    return enqueue(stream, &(struct Operation){.work = CALL, .function = function, .data = data});
}

CUresult cuCtxSynchronize(void)
{
    BEGIN(CONTEXT | SAFETY);
    done[WAITS]++;
    drain_all();
    return CUDA_SUCCESS;
}

// Events --------------------------------------------------------------------------------------------------------------
CUresult cuEventCreate(CUevent* event, unsigned flags)
{
    BEGIN(CONTEXT);
    *event = calloc(1, sizeof **event);
    lock();
    alive[EVENTS]++;
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event)
{
    BEGIN(CONTEXT);
    lock();
    alive[EVENTS]--;
    bool const pending = event->reached < event->wanted;
    unlock();
    if (pending)
    {
        // Not given back to the host, since that work will still touch it.
        complain(__func__, "destroyed before it was reached");
        return CUDA_SUCCESS;
    }
    free(event);
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream)
{
    BEGIN(CONTEXT);
    lock();
    event->stream = resolve(stream);
    struct Operation record = {.work = RECORD, .event = event};
    // What a graph records is a stamp that was reached before: nobody can wait for it.
    record.stamp = event->stream->capture ? 0 : ++event->wanted;
    unlock();
    return enqueue(stream, &record);
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags)
{
    return cuEventRecord(event, stream);
}

CUresult cuEventSynchronize(CUevent event)
{
    BEGIN(CONTEXT | SAFETY);
    done[WAITS] += event->reached < event->wanted;
    // Another thread may run the work that is waited for; then there is none here, until that thread is done.
    while (event->reached < event->wanted)
    {
        run_next(event->stream);
    }
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event)
{
    BEGIN(CONTEXT | SAFETY);
    if (event->reached < event->wanted)
    {
        run_next(event->stream);
    }
    return event->reached < event->wanted ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent from, CUevent to)
{
    BEGIN(CONTEXT);
    *milliseconds = 1;
    return CUDA_SUCCESS;
}
