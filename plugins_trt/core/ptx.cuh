// All inline PTX. Under MONOEDGE_EMULATION each function has a counterpart that runs on a CPU: ptx_emulated.h of the
// tests, which also says what the hardware does.

#pragma once

#ifdef MONOEDGE_EMULATION
#include "ptx_emulated.h"
#else

#include <cstdint>

namespace monoedge::ptx
{

/// The block's shared memory whose size the launch gave.
__device__ inline char* dynamicShared()
{
    extern __shared__ uint4 memory[];
    return reinterpret_cast<char*>(memory);
}

__device__ inline float floatOfHalf(std::uint16_t bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

/// Both rounded to nearest, ties to even; `low` in the lower half of the word.
__device__ inline std::uint32_t packHalf(float low, float high)
{
    std::uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ inline std::uint32_t packBFloat16(float low, float high)
{
    std::uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ inline std::uint32_t subtractHalf2(std::uint32_t a, std::uint32_t b)
{
    std::uint32_t word;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

/// Starts copying 16 bytes to shared memory, or writing 16 zeros if not `present`; `global` is then not read.
__device__ inline void copyAsync(void* shared, void const* global, bool present)
{
    auto const target = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
    int const bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}

/// Closes the group of copies that this thread started since the last call.
__device__ inline void commitCopies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most the latest `kPending` groups of this thread are under way.
template <int kPending>
__device__ inline void waitCopies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c += a · b for a [16, 16] and b [16, 8], 16-bit; or a [16, 32] and b [32, 8], int8. With group = lane / 4 and
// quad = lane % 4, words a0 and a2 are of row `group` of a, a1 and a3 of row `group + 8`, b0 and b1 of column `group`
// of b. a0, a1 and b0 hold the same places of the summed dimension, and so do a2, a3 and b1. Sums c0 and c1 are of row
// `group`, columns 2 · quad and 2 · quad + 1; c2 and c3 of row `group + 8`.

#define MONOEDGE_MMA(name, Sum, constraint, instruction)                                                               \
    __device__ inline void name(Sum(&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,    \
        std::uint32_t b0, std::uint32_t b1)                                                                            \
    {                                                                                                                  \
        asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
            : constraint(c[0]), constraint(c[1]), constraint(c[2]), constraint(c[3])                                   \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                   \
    }

MONOEDGE_MMA(mmaHalf, float, "+f", "m16n8k16.row.col.f32.f16.f16.f32")
MONOEDGE_MMA(mmaBFloat16, float, "+f", "m16n8k16.row.col.f32.bf16.bf16.f32")
MONOEDGE_MMA(mmaInt8, std::int32_t, "+r", "m16n8k32.row.col.s32.s8.s8.s32")
#undef MONOEDGE_MMA

} // namespace monoedge::ptx

#endif
