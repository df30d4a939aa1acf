// Work that waits in queues, and its running.
#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

void queue_add(struct Queue* queue, struct Operation const* operation)
{
    struct Operation* const copy = malloc(sizeof *copy);
    *copy = *operation;
    copy->next = NULL;
    *(queue->first ? queue->end : &queue->first) = copy;
    queue->end = &copy->next;
}

void queue_clear(struct Queue* queue)
{
    while (queue->first)
    {
        struct Operation* const next = queue->first->next;
        free(queue->first);
        queue->first = next;
    }
}

static void run(struct Operation const* operation)
{
    switch (operation->work)
    {
    case COPY:
        for (size_t row = 0; row < operation->rows; ++row)
        {
            memmove(operation->target + row * operation->target_pitch,
                operation->source + row * operation->source_pitch, operation->width);
        }
        done[COPIES]++;
        break;
    case FILL:
        for (size_t i = 0; i < operation->width; i += operation->value_size)
        {
            memcpy(operation->target + i, &operation->value, operation->value_size);
        }
        break;
    case RECORD:
        if (operation->event->reached < operation->stamp)
        {
            operation->event->reached = operation->stamp;
        }
        break;
    case WAIT:
        while (operation->event->reached < operation->stamp && run_next(operation->event->stream))
        {
        }
        break;
    case CALL: operation->function(operation->data); break;
    }
}

bool run_next(CUstream stream)
{
    // One work at a time, whoever waits. The lock of the state is not held: a function may need another lock, as
    // Python's, whose holder waits for that of the state.
    static pthread_mutex_t running = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
    pthread_mutex_lock(&running);
    lock();
    struct Operation* const operation = stream->queue.first;
    if (operation)
    {
        stream->queue.first = operation->next;
    }
    unlock();
    if (operation)
    {
        run(operation);
        free(operation);
    }
    pthread_mutex_unlock(&running);
    return operation != NULL;
}

void drain(CUstream stream)
{
    while (run_next(stream))
    {
    }
}

void drain_blocking(void)
{
    drain(resolve(NULL));
    for (CUstream stream = streams; stream; stream = stream->next)
    {
        if (!(stream->flags & CU_STREAM_NON_BLOCKING))
        {
            drain(stream);
        }
    }
}

void drain_all(void)
{
    drain(resolve(NULL));
    for (CUstream stream = streams; stream; stream = stream->next)
    {
        drain(stream);
    }
}

CUresult enqueue(CUstream stream, struct Operation const* operation)
{
    stream = resolve(stream);
    lock();
    queue_add(stream->capture ? &stream->capture->queue : &stream->queue, operation);
    unlock();
    return CUDA_SUCCESS;
}

static bool overlaps(char const* begin, size_t pitch, struct Operation const* operation, char const* address, size_t size)
{
    return operation->rows && begin < address + size && address < begin + (operation->rows - 1) * pitch + operation->width;
}

static bool uses(struct Queue const* queue, char const* address, size_t size)
{
    for (struct Operation const* operation = queue->first; operation; operation = operation->next)
    {
        if (overlaps(operation->target, operation->target_pitch, operation, address, size)
            || (operation->work == COPY
                && overlaps(operation->source, operation->source_pitch, operation, address, size)))
        {
            return true;
        }
    }
    return false;
}

bool is_in_use(void const* address, size_t size)
{
    bool used = uses(&resolve(NULL)->queue, address, size);
    for (CUstream stream = streams; stream && !used; stream = stream->next)
    {
        used = uses(&stream->queue, address, size);
    }
    return used;
}
