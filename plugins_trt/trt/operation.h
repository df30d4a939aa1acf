// Calls the kernels with a node's checked tensors. What differs between the families is here.

#pragma once

#include "../core/experts.h"
#include "contract.h"

namespace monoedge::trt
{

/// Bytes of workspace that the kernels need for these sizes.
std::size_t workspaceSize(schema::Operator const& op, Sizes const& sizes);

/// Enqueues the kernels. `inputs` are in the order of the definition.
cudaError_t enqueue(schema::Operator const& op, Sizes const& sizes, Type type, void const* const* inputs, void* output,
    void* workspace, cudaStream_t stream);

} // namespace monoedge::trt
