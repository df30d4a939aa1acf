// Calls the kernels with a node's checked tensors. What differs between the families is here.

#pragma once

#include "../core/experts.h"
#include "contract.h"

#include <string>

namespace monoedge::trt
{

/// One call of a node.
struct Call
{
    Sizes sizes;
    Type type;
    void const* const* inputs; ///< In the order of the definition.
    void* output;
    void* workspace;
};

/// Bytes of workspace that the kernels need for these sizes.
std::size_t workspaceSize(schema::Operator const& op, Sizes const& sizes);

/// What came of a call.
struct Outcome
{
    cudaError_t status;
    bool isFast; ///< Whether it took the fast paths, or had no rows.
};

/// Enqueues the kernels.
Outcome enqueue(schema::Operator const& op, Call const& call, cudaStream_t stream);

/// Whether calls with these sizes take the fast paths, if their tensors begin where they should.
bool isFast(schema::Operator const& op, Sizes const& sizes);

/// Why sizes keep calls from the fast paths, and what to do.
std::string whySlow(Sizes const& sizes);

/// The same of a call, whose sizes or addresses do.
std::string whySlow(schema::Operator const& op, Call const& call);

} // namespace monoedge::trt
