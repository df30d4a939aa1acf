// What the functions of core/ptx.cuh do, on a CPU.

#pragma once

#include "cuda_runtime.h"

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace monoedge::ptx
{

inline char* dynamicShared()
{
    return emulation::block.shared;
}

inline float floatOfHalf(std::uint16_t bits)
{
    static auto const values = [] {
        std::vector<float> table(1 << 16);
        for (int i = 0; i < 1 << 16; ++i)
        {
            int const exponent = i >> 10 & 0x1F;
            auto const fraction = static_cast<float>(i & 0x3FF);
            float const special = fraction == 0 ? std::numeric_limits<float>::infinity()
                                                : std::numeric_limits<float>::quiet_NaN();
            float const magnitude = exponent == 0x1F ? special
                : exponent == 0                      ? std::ldexp(fraction, -24)
                                                     : std::ldexp(1024 + fraction, exponent - 25);
            table[static_cast<std::size_t>(i)] = i >> 15 ? -magnitude : magnitude;
        }
        return table;
    }();
    return values[bits];
}

/// To nearest, ties to even.
inline std::uint16_t bitsOfHalf(float value)
{
    std::uint32_t const bits = __float_as_uint(value);
    std::uint32_t const sign = bits >> 16 & 0x8000U;
    float const magnitude = std::fabs(value);
    if (std::isnan(value))
    {
        return 0x7FFF;
    }
    if (magnitude >= 65520.0F)
    {
        return static_cast<std::uint16_t>(sign | 0x7C00U);
    }
    if (magnitude < 6.103515625e-5F)
    {
        return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(std::nearbyint(magnitude * 16777216.0F)));
    }
    std::uint32_t const rounded = (bits & 0x7FFFFFFFU) + 0xFFFU + (bits >> 13 & 1U);
    return static_cast<std::uint16_t>(sign | ((rounded - (112U << 23)) >> 13));
}

inline float floatOfBFloat16(std::uint16_t bits)
{
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t bitsOfBFloat16(float value)
{
    std::uint32_t const bits = __float_as_uint(value);
    std::uint32_t const rounded = bits + 0x7FFFU + (bits >> 16 & 1U);
    return std::isnan(value) ? 0x7FFF : static_cast<std::uint16_t>(rounded >> 16);
}

inline std::uint32_t packHalf(float low, float high)
{
    return bitsOfHalf(low) | static_cast<std::uint32_t>(bitsOfHalf(high)) << 16;
}

inline std::uint32_t packBFloat16(float low, float high)
{
    return bitsOfBFloat16(low) | static_cast<std::uint32_t>(bitsOfBFloat16(high)) << 16;
}

inline std::uint32_t subtractHalf2(std::uint32_t a, std::uint32_t b)
{
    auto const half
        = [](std::uint32_t word, int shift) { return floatOfHalf(static_cast<std::uint16_t>(word >> shift)); };
    return packHalf(half(a, 0) - half(b, 0), half(a, 16) - half(b, 16));
}

inline void copyAsync(void* shared, void const* global, bool present)
{
    assert(reinterpret_cast<std::uintptr_t>(shared) % 16 == 0);
    assert(reinterpret_cast<std::uintptr_t>(global) % 16 == 0);
    emulation::block.fiber().open.push_back({shared, global, present});
    emulation::Observer& observer = emulation::observer;
    auto const offset
        = reinterpret_cast<std::uintptr_t>(global) - reinterpret_cast<std::uintptr_t>(observer.watched);
    observer.copiedBytes += present && offset < observer.watchedSize ? 16 : 0;
}

inline void commitCopies()
{
    emulation::Fiber& fiber = emulation::block.fiber();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int kPending>
void waitCopies()
{
    auto& groups = emulation::block.fiber().groups;
    for (; groups.size() > kPending; groups.pop_front())
    {
        for (emulation::Copy const& copy : groups.front())
        {
            if (copy.present)
            {
                std::memcpy(copy.target, copy.source, 16);
            }
            else
            {
                std::memset(copy.target, 0, 16);
            }
        }
    }
}

/// Lane (group, quad) makes sums of rows `group` and `group + 8` of a with columns 2 · quad and 2 · quad + 1 of b: the
/// places of row r are with lanes 4 · (r % 8) … + 3, and so are those of column r.
template <typename Sum, typename Dot>
void addProducts(Sum (&c)[4], Dot&& dot)
{
    int const lane = emulation::block.lane();
    for (int i = 0; i < 4; ++i)
    {
        for (int quad = 0; quad < 4; ++quad)
        {
            c[i] += dot(4 * (lane / 4) + quad, i / 2, 4 * (2 * (lane % 4) + i % 2) + quad);
        }
    }
}

template <typename ToFloat>
void mma16(emulation::Collective operation, ToFloat&& toFloat, float (&c)[4], std::uint32_t const (&a)[4],
    std::uint32_t const (&b)[2])
{
    emulation::Slot& slot = emulation::block.slot();
    for (int place = 0; place < 4; ++place)
    {
        auto const element
            = [&](std::uint32_t word) { return toFloat(static_cast<std::uint16_t>(word >> 16 * (place % 2))); };
        slot.a[0][place] = element(a[place / 2 * 2]);
        slot.a[1][place] = element(a[place / 2 * 2 + 1]);
        slot.b[place] = element(b[place / 2]);
    }
    emulation::Slot const* const lanes = emulation::block.meet(operation);
    addProducts(c, [=](int laneOfA, int half, int laneOfB) {
        float sum = 0;
        for (int place = 0; place < 4; ++place)
        {
            sum += lanes[laneOfA].a[half][place] * lanes[laneOfB].b[place];
        }
        return sum;
    });
}

inline void mmaHalf(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
    std::uint32_t b0, std::uint32_t b1)
{
    mma16(emulation::Collective::kMmaHalf, floatOfHalf, c, {a0, a1, a2, a3}, {b0, b1});
}

inline void mmaBFloat16(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
    std::uint32_t b0, std::uint32_t b1)
{
    mma16(emulation::Collective::kMmaBFloat16, floatOfBFloat16, c, {a0, a1, a2, a3}, {b0, b1});
}

inline void mmaInt8(std::int32_t (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
    std::uint32_t b0, std::uint32_t b1)
{
    emulation::Slot& slot = emulation::block.slot();
    std::uint32_t const a[2][2]{{a0, a2}, {a1, a3}};
    std::uint32_t const b[2]{b0, b1};
    std::memcpy(slot.a8, a, sizeof a);
    std::memcpy(slot.b8, b, sizeof b);
    emulation::Slot const* const lanes = emulation::block.meet(emulation::Collective::kMmaInt8);
    addProducts(c, [=](int laneOfA, int half, int laneOfB) {
        std::int32_t sum = 0;
        for (int place = 0; place < 8; ++place)
        {
            sum += lanes[laneOfA].a8[half][place] * lanes[laneOfB].b8[place];
        }
        return sum;
    });
}

} // namespace monoedge::ptx
