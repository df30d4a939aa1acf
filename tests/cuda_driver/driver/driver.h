// A CUDA driver whose device memory is host memory, for tests: what its parts share.
//
// Streams are lazy: what is enqueued runs when somebody waits for it, so that a wait too few shows in the answer. What
// a real driver would punish now and then (a call without a context, an unsafe call while a thread captures, an address
// that is not allocated, pageable memory in an asynchronous copy) is a complaint here, always. Tests ask for complaints
// and for what is still alive by the functions of report.c.
#pragma once

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>

// One lock guards all that is declared here; it may be taken again by the thread that holds it.
void lock(void);
void unlock(void);

// Counts of what is alive, by kind; tests read them by name.
enum Kind
{
    DEVICE_BYTES,
    HOST_BYTES,
    STREAMS,
    EVENTS,
    GRAPHS,
    EXECUTABLES,
    RETAINS, // of the primary context
    PUSHED,  // contexts on the stacks of all threads
    KINDS
};
extern long alive[KINDS];

// Counts of what happened.
enum Deed
{
    COPIES,
    LAUNCHES, // of graphs
    WAITS,    // that found something to wait for
    CAPTURES,
    DEEDS
};
extern long done[DEEDS];

/// Notes a fault of the caller.
void complain(char const* function, char const* format, ...) __attribute__((format(printf, 2, 3)));

/// Whether a test has ordered that a function is not found.
bool is_hidden(char const* name);

// What a call needs.
enum Need
{
    NOTHING = 0,
    CONTEXT = 1, // one that is current in this thread, and alive
    SAFETY = 2   // no capture that forbids the call, which may wait or allocate
};

/// Begins a call: returns the error that a test has ordered for it, or that of a need that is not met.
CUresult begin(char const* function, int needs);

#define BEGIN(needs)                                                                                                   \
    do                                                                                                                 \
    {                                                                                                                  \
        CUresult const begun = begin(__func__, needs);                                                                 \
        if (begun != CUDA_SUCCESS)                                                                                     \
        {                                                                                                              \
            return begun;                                                                                              \
        }                                                                                                              \
    } while (0)

// Contexts ------------------------------------------------------------------------------------------------------------
struct CUctx_st
{
    bool alive;
};
CUcontext current_context(void);

// Memory --------------------------------------------------------------------------------------------------------------
extern size_t memory_total;

/// Whether bytes lie in one block of memory that is allocated, of the host or of the device.
bool is_allocated(void const* address, size_t size);

// Work ----------------------------------------------------------------------------------------------------------------
enum Work
{
    COPY, // `rows` rows of `width` bytes
    FILL,
    RECORD,
    WAIT,
    CALL
};

struct Operation
{
    enum Work work;
    char* target;
    char const* source;
    size_t width, rows, target_pitch, source_pitch;
    unsigned value, value_size;
    CUevent event;
    unsigned long long stamp;
    CUhostFn function;
    void* data;
    struct Operation* next;
};

struct Queue
{
    struct Operation* first;
    struct Operation** end;
};
void queue_add(struct Queue* queue, struct Operation const* operation);
void queue_clear(struct Queue* queue);

struct CUevent_st
{
    CUstream stream;
    unsigned long long wanted, reached;
};

struct CUgraph_st
{
    struct Queue queue;
};
struct CUgraphExec_st
{
    struct Queue queue;
};

struct CUstream_st
{
    unsigned flags;
    struct Queue queue;
    CUgraph capture; // NULL unless it captures
    CUstreamCaptureMode mode;
    bool invalid;
    long thread;
    unsigned long long capture_id;
    struct CUstream_st* next;
};
extern struct CUstream_st* streams;

/// The default stream for its names, else the stream itself.
CUstream resolve(CUstream stream);

/// Adds work to a stream or to what it captures.
CUresult enqueue(CUstream stream, struct Operation const* operation);

/// Runs the next work of a stream; returns false if there was none.
bool run_next(CUstream stream);

/// Waits for a stream, for the streams that the default one waits for, or for all.
void drain(CUstream stream);
void drain_blocking(void);
void drain_all(void);

/// Whether work that is still to run touches a block.
bool is_in_use(void const* address, size_t size);

// Captures ------------------------------------------------------------------------------------------------------------
long this_thread(void);

/// Returns an error, and spoils what is captured, if a capture forbids calls that may wait or allocate.
CUresult require_safety(char const* function);

// Stubs ---------------------------------------------------------------------------------------------------------------
/// Names of calls that are declared in NVIDIA's header and not written here; ends with NULL.
extern char const* const unimplemented[];
