// Captures and graphs.
#define _GNU_SOURCE
#include "driver.h"

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

long this_thread(void)
{
    return syscall(SYS_gettid);
}

/// The rules of cuThreadExchangeStreamCaptureMode: a thread may not make unsafe calls while it captures itself, nor
/// while any thread captures globally; a relaxed capture, or a relaxed thread, forbids nothing.
static bool forbids(struct CUstream_st const* stream)
{
    return stream->capture && stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED
        && (stream->thread == this_thread() || (stream->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && !thread_mode));
}

CUresult require_safety(char const* function)
{
    bool forbidden = false;
    lock();
    for (struct CUstream_st* stream = streams; stream && thread_mode != CU_STREAM_CAPTURE_MODE_RELAXED;
         stream = stream->next)
    {
        if (forbids(stream))
        {
            stream->invalid = forbidden = true;
        }
    }
    unlock();
    if (forbidden)
    {
        complain(function, "it may wait, and a capture forbids that in this thread");
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode)
{
    BEGIN(NOTHING);
    CUstreamCaptureMode const before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

// Captures ------------------------------------------------------------------------------------------------------------
static CUgraph new_graph(void)
{
    CUgraph const graph = calloc(1, sizeof *graph);
    alive[GRAPHS]++;
    return graph;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode)
{
    static unsigned long long captures;
    BEGIN(CONTEXT);
    if (resolve(stream) != stream || stream->capture)
    {
        complain(__func__, stream ? "it captures already" : "the default stream");
        return stream ? CUDA_ERROR_ILLEGAL_STATE : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    lock();
    stream->capture = new_graph();
    stream->mode = mode;
    stream->invalid = false;
    stream->thread = this_thread();
    stream->capture_id = ++captures;
    done[CAPTURES]++;
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph)
{
    BEGIN(CONTEXT);
    stream = resolve(stream);
    *graph = NULL;
    if (!stream->capture)
    {
        complain(__func__, "nothing is captured");
        return CUDA_ERROR_ILLEGAL_STATE;
    }
    if (stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED && stream->thread != this_thread())
    {
        complain(__func__, "another thread began");
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    }
    lock();
    *graph = stream->capture;
    stream->capture = NULL;
    unlock();
    if (stream->invalid)
    {
        cuGraphDestroy(*graph);
        *graph = NULL;
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status)
{
    BEGIN(CONTEXT);
    stream = resolve(stream);
    *status = !stream->capture ? CU_STREAM_CAPTURE_STATUS_NONE
        : stream->invalid      ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                               : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
    CUgraphNode const** dependencies, size_t* count)
{
    BEGIN(CONTEXT);
    if (id)
    {
        *id = resolve(stream)->capture_id;
    }
    if (graph)
    {
        *graph = resolve(stream)->capture;
    }
    if (dependencies)
    {
        *dependencies = NULL;
    }
    if (count)
    {
        *count = 0;
    }
    return cuStreamIsCapturing(stream, status);
}

// Graphs --------------------------------------------------------------------------------------------------------------
CUresult cuGraphDestroy(CUgraph graph)
{
    BEGIN(NOTHING);
    lock();
    queue_clear(&graph->queue);
    alive[GRAPHS]--;
    unlock();
    free(graph);
    return CUDA_SUCCESS;
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count)
{
    BEGIN(NOTHING);
    *count = 0;
    for (struct Operation const* operation = graph->queue.first; operation; operation = operation->next)
    {
        ++*count;
    }
    return nodes ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags)
{
    BEGIN(CONTEXT | SAFETY);
    lock();
    *executable = calloc(1, sizeof **executable);
    for (struct Operation const* operation = graph->queue.first; operation; operation = operation->next)
    {
        queue_add(&(*executable)->queue, operation);
    }
    alive[EXECUTABLES]++;
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec executable)
{
    BEGIN(CONTEXT | SAFETY);
    lock();
    queue_clear(&executable->queue);
    alive[EXECUTABLES]--;
    unlock();
    free(executable);
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream)
{
    BEGIN(CONTEXT);
    lock();
    done[LAUNCHES]++;
    for (struct Operation const* operation = executable->queue.first; operation; operation = operation->next)
    {
        enqueue(stream, operation);
    }
    unlock();
    return CUDA_SUCCESS;
}
