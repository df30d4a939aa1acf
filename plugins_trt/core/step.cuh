// One step of an operator, as kernels see it: each row times the matrix of its expert. ExpertLinear is one step;
// FusedMoE is a gated step (gate and up, then silu(gate) · up) and a plain one (down).

#pragma once

#include "types.cuh"

#include <cstdint>
#include <type_traits>

namespace monoedge
{

/// How an expert's matrix and the rows for it are stored.
enum class Format : std::int32_t
{
    kFloat,      ///< Both in 16 bits.
    kInt8Weight, ///< int8 weights, 16-bit rows.
    kInt8,       ///< int8 weights and rows: sums are in int32, and exact.
};

constexpr int kExperts{2}; ///< Text, visual: what the mask says.

/// Where the rows of each expert are listed, in rising order. In the workspace; written by routeKernel.
struct Routing
{
    std::int32_t* counts; ///< [kExperts]
    std::int32_t* rows;   ///< [kExperts, capacity]
    std::int32_t capacity;

    __device__ std::int32_t const* list(int expert) const
    {
        return rows + static_cast<std::int64_t>(expert) * capacity;
    }
};

struct StepExpert
{
    Format format;
    char const* input; ///< Row r begins r · inputStride bytes further on.
    std::int64_t inputStride;
    char const* weight;      ///< [out, in]; of a gated step [2 · out, in].
    float const* scale;      ///< One for each row of weight; null with kFloat.
    float const* inputScale; ///< [1]; null except with kInt8.
    char* output;            ///< Row r begins r · outputStride bytes further on.
    std::int64_t outputStride;
    float const* outputScale; ///< [1]: the output is quantized to int8 by it. Null: it is 16 bits.
};

struct Step
{
    std::int32_t rows;
    std::int32_t in;
    std::int32_t out;
    bool const* visualMask;
    Routing routing;
    StepExpert experts[kExperts];
};

template <Format kFormat>
using SumOf = std::conditional_t<kFormat == Format::kInt8, std::int32_t, float>;

template <Format kFormat>
constexpr int kWeightBytes = kFormat == Format::kFloat ? 2 : 1;

template <Format kFormat>
constexpr int kInputBytes = kFormat == Format::kInt8 ? 1 : 2;

/// The value that a sum over row `weightRow` of the matrix stands for.
template <Format kFormat>
__device__ float dequantize(StepExpert const& expert, std::int32_t weightRow, SumOf<kFormat> sum)
{
    if constexpr (kFormat == Format::kFloat)
    {
        return sum;
    }
    else if constexpr (kFormat == Format::kInt8Weight)
    {
        return sum * expert.scale[weightRow];
    }
    else
    {
        return static_cast<float>(sum) * (expert.scale[weightRow] * *expert.inputScale);
    }
}

/// Stores one element. Only the output of a gated step is ever quantized.
template <typename T, bool kGated>
__device__ void store(StepExpert const& expert, std::int32_t row, std::int32_t column, float value)
{
    char* const line = expert.output + row * expert.outputStride;
    if (kGated && expert.outputScale != nullptr)
    {
        reinterpret_cast<std::int8_t*>(line)[column] = static_cast<std::int8_t>(quantize(value, *expert.outputScale));
    }
    else
    {
        reinterpret_cast<std::uint16_t*>(line)[column] = static_cast<std::uint16_t>(T::pack(value, 0.0F));
    }
}

/// Stores eight neighbours at once; `column` is a multiple of 8, and rows of the output are aligned to 16 bytes.
template <typename T, bool kGated>
__device__ void storeEight(StepExpert const& expert, std::int32_t row, std::int32_t column, float const (&values)[8])
{
    char* const line = expert.output + row * expert.outputStride;
    if (kGated && expert.outputScale != nullptr)
    {
        float const scale = *expert.outputScale;
        std::uint32_t words[2]{};
#pragma unroll
        for (int i = 0; i < 8; ++i)
        {
            words[i / 4] |= (static_cast<std::uint32_t>(quantize(values[i], scale)) & 0xFFU) << (8 * (i % 4));
        }
        *reinterpret_cast<uint2*>(line + column) = uint2{words[0], words[1]};
    }
    else
    {
        Vector vector;
#pragma unroll
        for (int i = 0; i < 4; ++i)
        {
            vector.words[i] = T::pack(values[2 * i], values[2 * i + 1]);
        }
        *reinterpret_cast<Vector*>(line + 2 * static_cast<std::int64_t>(column)) = vector;
    }
}

/// Calls `function` with the expert's format as a constant.
template <typename Function>
__device__ void withFormat(Format format, Function&& function)
{
    switch (format)
    {
    case Format::kFloat: function(std::integral_constant<Format, Format::kFloat>{}); break;
    case Format::kInt8Weight: function(std::integral_constant<Format, Format::kInt8Weight>{}); break;
    case Format::kInt8: function(std::integral_constant<Format, Format::kInt8>{}); break;
    }
}

} // namespace monoedge
