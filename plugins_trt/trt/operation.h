// From a node's checked tensors to a call of the kernels: all that FusedMoE and ExpertLinear do not share.

#pragma once

#include "../core/experts.h"
#include "contract.h"

namespace monoedge::trt
{

struct Operation
{
    schema::Operator const& definition;

    /// Bytes that the kernels need for these sizes.
    std::size_t (*workspace)(Sizes const& sizes);

    /// Enqueues the kernels. `inputs` are in the order of the definition.
    cudaError_t (*enqueue)(Sizes const& sizes, Type type, void const* const* inputs, void* output, void* workspace,
        cudaStream_t stream);
};

inline constexpr std::int32_t kOperations{2};
extern Operation const gOperations[kOperations];

} // namespace monoedge::trt
