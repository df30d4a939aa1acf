// What schema.h is written in: an operator as plain data.

#pragma once

#include <cstdint>

namespace monoedge::schema
{

/// What a tensor's elements may be. kT is the node's one floating-point type.
enum class Kind : std::int32_t
{
    kT,
    kBool,
};

/// One dimension: `factor` times the number that the node gives the name schema::Dim(dim).
struct Extent
{
    std::int32_t factor;
    std::int32_t dim;
};

inline constexpr std::int32_t kMaxRank{3};

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
    std::int32_t nbInputs;
    Tensor const* inputs;
    Tensor output;
};

} // namespace monoedge::schema
