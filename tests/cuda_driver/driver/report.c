// Complaints, counts, and errors that tests order.
#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

void lock(void)
{
    pthread_mutex_lock(&mutex);
}

void unlock(void)
{
    pthread_mutex_unlock(&mutex);
}

long alive[KINDS];
long done[DEEDS];

static char complaints[4096];

void complain(char const* function, char const* format, ...)
{
    char what[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    lock();
    size_t const used = strlen(complaints);
    snprintf(complaints + used, sizeof complaints - used, "%s: %s\n", function, what);
    unlock();
}

// What tests call -----------------------------------------------------------------------------------------------------
/// Copies the complaints since the last call, one a line, and forgets them.
void fake_complaints(char* buffer, size_t size)
{
    lock();
    snprintf(buffer, size, "%s", complaints);
    complaints[0] = 0;
    unlock();
}

/// How much of something is alive; -1 for a kind that does not exist.
long fake_alive(char const* kind)
{
    static char const* const names[KINDS]
        = {"device bytes", "host bytes", "streams", "events", "graphs", "executables", "retains", "pushed"};
    for (int i = 0; i < KINDS; ++i)
    {
        if (strcmp(kind, names[i]) == 0)
        {
            return alive[i];
        }
    }
    return -1;
}

/// How often something happened since the process began; -1 for a deed that does not exist.
long fake_done(char const* deed)
{
    static char const* const names[DEEDS] = {"copies", "launches", "waits", "captures"};
    for (int i = 0; i < DEEDS; ++i)
    {
        if (strcmp(deed, names[i]) == 0)
        {
            return done[i];
        }
    }
    return -1;
}

/// Sets the bytes of device memory.
void fake_set_memory(size_t size)
{
    memory_total = size;
}

/// Whether bytes lie in one allocated block.
int fake_is_allocated(void const* address, size_t size)
{
    return is_allocated(address, size);
}

static struct
{
    char name[64];
    int calls; // until it fails
    int times;
    CUresult error;
} ordered;

/// Lets the `calls`-th call from now of a function, named without its version, fail, and those after it until `times`
/// have; NULL orders nothing.
void fake_fail(char const* name, int calls, int error, int times)
{
    lock();
    snprintf(ordered.name, sizeof ordered.name, "%s", name ? name : "");
    ordered.calls = calls;
    ordered.times = times;
    ordered.error = (CUresult)error;
    unlock();
}

static char hidden[64];

/// Lets the driver be older than a function, whose name is no longer found; to be called before it is looked up.
void fake_hide(char const* name)
{
    snprintf(hidden, sizeof hidden, "%s", name);
}

bool is_hidden(char const* name)
{
    return strcmp(name, hidden) == 0;
}

static CUresult take_ordered(char const* function)
{
    size_t const length = strlen(ordered.name);
    bool const named = length && strncmp(function, ordered.name, length) == 0
        && (function[length] == 0 || strncmp(function + length, "_v", 2) == 0);
    if (!named || --ordered.calls > 0)
    {
        return CUDA_SUCCESS;
    }
    if (--ordered.times <= 0)
    {
        ordered.name[0] = 0;
    }
    return ordered.error;
}

CUresult begin(char const* function, int needs)
{
    lock();
    CUresult error = take_ordered(function);
    unlock();
    if (error == CUDA_SUCCESS && needs & CONTEXT)
    {
        CUcontext const context = current_context();
        if (context == NULL || !context->alive)
        {
            complain(function, context ? "the current context is destroyed" : "no current context");
            error = context ? CUDA_ERROR_CONTEXT_IS_DESTROYED : CUDA_ERROR_INVALID_CONTEXT;
        }
    }
    return error == CUDA_SUCCESS && needs & SAFETY ? require_safety(function) : error;
}
