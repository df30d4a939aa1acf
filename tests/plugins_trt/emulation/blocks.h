// CUDA blocks on a CPU: each thread of a block is a fiber, blocks run one after the other.
//
// Fibers run until they wait for others, and a warp until it waits for other warps, so that a run is deterministic and
// warps drift apart as far as barriers let them. What is checked on the way: threads of a warp meet in the same
// collective operation, nobody waits for a barrier that cannot come, shared memory starts as garbage, and copies to
// shared memory happen no sooner than they are waited for. What cannot be: races that need another order, time, and
// whether the hardware's fragments lie as ptx.cuh says.

#pragma once

#include "cuda_runtime_api.h"

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

inline dim3 threadIdx;
inline dim3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace emulation
{

enum class Collective : std::int32_t
{
    kBallot,
    kMmaHalf,
    kMmaBFloat16,
    kMmaInt8,
};

/// What a lane gives to the others of its warp.
struct Slot
{
    Collective operation;
    std::uint32_t word;
    float a[2][4];
    float b[4];
    std::int8_t a8[2][8];
    std::int8_t b8[8];
};

struct Barrier
{
    int members{0};
    int arrived{0};
    std::uint64_t generation{0};
};

struct Copy
{
    void* target;
    void const* source;
    bool present;
};

struct Fiber
{
    static constexpr std::size_t kStackBytes{64 * 1024};

    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t start;
    std::jmp_buf context;
    bool isStarted;
    bool isDone;
    unsigned collectives; ///< How many this fiber has been in.
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

/// What tests want to know of a call, and to make happen.
struct Observer
{
    int processors{3};      ///< How many multiprocessors the device seems to have: tiles are chosen by it.
    int launches{0};        ///< Kernels started so far.
    int failingLaunch{-1};  ///< The launch of this number fails,
    cudaError_t failure{cudaErrorLaunchOutOfResources}; ///< with this status.
    char const* watched{nullptr};
    std::size_t watchedSize{0};
    std::size_t copiedBytes{0}; ///< Copied to shared memory from what is watched.
};

inline Observer observer;

class Block
{
public:
    char* shared{nullptr};
    bool backwards{false}; ///< Whether the last warp, and of a warp the last thread, comes first.

    void run(int threads, std::size_t sharedBytes, std::function<void()> const& body)
    {
        mBody = &body;
        mThreads = threads;
        while (mFibers.size() < static_cast<std::size_t>(threads))
        {
            mFibers.emplace_back();
        }
        mShared.assign(sharedBytes / sizeof(Line) + 1, Line{});
        std::memset(static_cast<void*>(mShared.data()), 0xFF, mShared.size() * sizeof(Line));
        shared = mShared.data()->bytes;
        mBlock = Barrier{threads, 0, 0};
        mWarps.assign(static_cast<std::size_t>(threads / 32), Barrier{32, 0, 0});
        mSlots.resize(static_cast<std::size_t>(2 * threads));
        for (int i = 0; i < threads; ++i)
        {
            Fiber& fiber = mFibers[i];
            fiber.isStarted = false;
            fiber.isDone = false;
            fiber.collectives = 0;
            fiber.open.clear();
            fiber.groups.clear();
        }
        mDone = 0;
        while (mDone < threads)
        {
            bool hasMoved = false;
            for (int turn = 0; turn < threads / 32; ++turn)
            {
                hasMoved |= runWarp(backwards ? threads / 32 - 1 - turn : turn);
            }
            if (!hasMoved)
            {
                fail("threads wait for a barrier that others never reach");
            }
        }
    }

    void synchronize()
    {
        wait(mBlock);
    }

    Fiber& fiber()
    {
        return mFibers[mCurrent];
    }

    int lane() const
    {
        return mCurrent % 32;
    }

    /// This lane's place in the coming collective operation.
    Slot& slot()
    {
        return mSlots[slotIndex(fiber().collectives, mCurrent)];
    }

    /// Waits for the warp; gives what its 32 lanes brought. Valid until this lane's next collective operation: lanes
    /// cannot be two ahead, and the places alternate.
    Slot const* meet(Collective operation)
    {
        slot().operation = operation;
        unsigned const turn = fiber().collectives++;
        wait(mWarps[mCurrent / 32]);
        Slot const* const first = &mSlots[slotIndex(turn, mCurrent / 32 * 32)];
        for (int i = 0; i < 32; ++i)
        {
            if (first[i].operation != operation)
            {
                fail("lanes of a warp are in different collective operations");
            }
        }
        return first;
    }

    Slot const* exchange(Collective operation, std::uint32_t word)
    {
        slot().word = word;
        return meet(operation);
    }

private:
    struct alignas(128) Line
    {
        char bytes[128];
    };

    std::size_t slotIndex(unsigned turn, int thread) const
    {
        return static_cast<std::size_t>(turn % 2 * static_cast<unsigned>(mThreads) + static_cast<unsigned>(thread));
    }

    [[noreturn]] static void fail(char const* what)
    {
        std::fprintf(stderr, "emulation: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
        std::abort();
    }

    static void enter();

    /// As far as it gets without the other warps; whether it moved at all.
    bool runWarp(int warp)
    {
        bool hasMoved = false;
        do
        {
            mMoved = false;
            for (int turn = 0; turn < 32; ++turn)
            {
                mCurrent = 32 * warp + (backwards ? 31 - turn : turn);
                if (!fiber().isDone)
                {
                    resume();
                }
            }
            hasMoved |= mMoved;
        } while (mMoved);
        return hasMoved;
    }

    void resume()
    {
        threadIdx = dim3(static_cast<unsigned>(mCurrent), 0, 0);
        if (_setjmp(mMain) == 0)
        {
            go(fiber());
        }
    }

    /// Contexts only start a fiber: switching by them calls the system each time, jumping doesn't.
    void go(Fiber& fiber)
    {
        if (fiber.isStarted)
        {
            _longjmp(fiber.context, 1);
        }
        fiber.isStarted = true;
        mMoved = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = Fiber::kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Block::enter, 0);
        setcontext(&fiber.start);
    }

    void pause()
    {
        if (_setjmp(fiber().context) == 0)
        {
            _longjmp(mMain, 1);
        }
    }

    void release(Barrier& barrier)
    {
        if (barrier.members > 0 && barrier.arrived == barrier.members)
        {
            barrier.arrived = 0;
            ++barrier.generation;
            mMoved = true;
        }
    }

    void wait(Barrier& barrier)
    {
        std::uint64_t const generation = barrier.generation;
        ++barrier.arrived;
        release(barrier);
        while (barrier.generation == generation)
        {
            pause();
        }
    }

    void finish()
    {
        fiber().isDone = true;
        ++mDone;
        mMoved = true;
        for (Barrier* barrier : {&mBlock, &mWarps[mCurrent / 32]})
        {
            --barrier->members;
            release(*barrier);
        }
        _longjmp(mMain, 1);
    }

    std::function<void()> const* mBody{nullptr};
    int mThreads{0};
    int mCurrent{0};
    int mDone{0};
    bool mMoved{false};
    std::jmp_buf mMain;
    std::deque<Fiber> mFibers;
    std::vector<Line> mShared;
    Barrier mBlock;
    std::vector<Barrier> mWarps;
    std::vector<Slot> mSlots;
};

inline Block block;

inline void Block::enter()
{
    (*block.mBody)();
    block.finish();
}

inline void launch(dim3 grid, dim3 threads, std::size_t sharedBytes, std::function<void()> const& body)
{
    gridDim = grid;
    blockDim = threads;
    for (unsigned z = 0; z < grid.z; ++z)
    {
        for (unsigned y = 0; y < grid.y; ++y)
        {
            for (unsigned x = 0; x < grid.x; ++x)
            {
                blockIdx = dim3(x, y, z);
                block.run(static_cast<int>(threads.x), sharedBytes, body);
            }
        }
    }
}

} // namespace emulation
