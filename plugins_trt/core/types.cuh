// Number formats: conversions between floats and 16-bit or 8-bit elements, and the tensor-core product of each.

#pragma once

#include "ptx.cuh"

#include <cstdint>

namespace monoedge
{

/// What one lane moves at once. Reading and writing through it is 16 bytes wide.
struct alignas(16) Vector
{
    std::uint32_t words[4];
};

struct Float16
{
    __device__ static float toFloat(std::uint16_t bits)
    {
        return ptx::floatOfHalf(bits);
    }

    /// Two elements in a word, rounded to nearest, ties to even; `low` comes first in memory.
    __device__ static std::uint32_t pack(float low, float high)
    {
        return ptx::packHalf(low, high);
    }

    /// Four int8 to four elements, exactly. 0x6400 + n is 1024 + n for n in 0 … 255.
    __device__ static void widen(std::uint32_t bytes, std::uint32_t& first, std::uint32_t& second)
    {
        std::uint32_t const biased = bytes ^ 0x80808080U;
        std::uint32_t constexpr k1024{0x64646464U};
        std::uint32_t constexpr k1152{0x64806480U};
        first = ptx::subtractHalf2(__byte_perm(biased, k1024, 0x4140), k1152);
        second = ptx::subtractHalf2(__byte_perm(biased, k1024, 0x4342), k1152);
    }

    template <typename... Words>
    __device__ static void mma(float (&sum)[4], Words... words)
    {
        ptx::mmaHalf(sum, words...);
    }
};

struct BFloat16
{
    __device__ static float toFloat(std::uint16_t bits)
    {
        return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
    }

    __device__ static std::uint32_t pack(float low, float high)
    {
        return ptx::packBFloat16(low, high);
    }

    /// Four int8 to four elements, exactly: bfloat16 holds 8 significant bits, and so is the upper half of a float.
    __device__ static void widen(std::uint32_t bytes, std::uint32_t& first, std::uint32_t& second)
    {
        std::uint32_t const biased = bytes ^ 0x80808080U;
        first = __byte_perm(floatBits<0>(biased), floatBits<1>(biased), 0x7632);
        second = __byte_perm(floatBits<2>(biased), floatBits<3>(biased), 0x7632);
    }

    template <typename... Words>
    __device__ static void mma(float (&sum)[4], Words... words)
    {
        ptx::mmaBFloat16(sum, words...);
    }

private:
    /// Byte kByte less 128, as a float's bits. 0x4B000000 + n is 2^23 + n.
    template <int kByte>
    __device__ static std::uint32_t floatBits(std::uint32_t biased)
    {
        float const shifted = __uint_as_float(__byte_perm(biased, 0x4B000000U, 0x7540 + kByte));
        return __float_as_uint(shifted - 8388736.0F);
    }
};

/// value / scale in int8: divided in float, rounded to nearest, ties to even, and saturated to [-128, 127], which is
/// QuantizeLinear of the value in float32 with zero point 0. NaN becomes 0.
__device__ inline std::int32_t quantize(float value, float scale)
{
    std::int32_t const rounded = __float2int_rn(value / scale);
    return rounded < -128 ? -128 : rounded > 127 ? 127 : rounded;
}

/// silu(gate) · up in float.
__device__ inline float gated(float gate, float up)
{
    return gate / (1.0F + __expf(-gate)) * up;
}

} // namespace monoedge
