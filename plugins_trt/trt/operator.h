// An operator as plain data. schema.h has the list.

#pragma once

#include <cstdint>

namespace monoedge::schema
{

/// The type of a tensor's elements. kT is the node's one floating-point type.
enum class Kind : std::int32_t
{
    kT,
    kBool,
    kInt8,
    kFloat32,
};

/// What an operator computes, in any formats of its matrices.
enum class Family : std::int32_t
{
    kFusedMoE,
    kExpertLinear,
};

/// One dimension: `factor` times the number that the node gives the name schema::Dim(dim).
struct Extent
{
    std::int32_t factor;
    std::int32_t dim;
};

inline constexpr std::int32_t kMaxRank{3};
inline constexpr std::int32_t kMaxInputs{14};

struct Tensor
{
    char const* name;
    Kind kind;
    std::int32_t rank;
    Extent shape[kMaxRank];
};

struct Operator
{
    char const* name;
    Family family;
    Tensor output;
    std::int32_t nbInputs;
    Tensor inputs[kMaxInputs];

    /// An input, or the output behind the last input.
    constexpr Tensor const& tensor(std::int32_t position) const
    {
        return position < nbInputs ? inputs[position] : output;
    }
};

} // namespace monoedge::schema
