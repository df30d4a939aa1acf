#include "operation.h"

namespace monoedge::trt
{

namespace
{

namespace FusedMoE
{

using namespace schema::FusedMoE;

std::size_t workspace(Sizes const& sizes)
{
    return fusedMoeWorkspace(sizes.rows(), sizes[schema::kIn], sizes[schema::kInter]);
}

cudaError_t enqueue(
    Sizes const& sizes, Type type, void const* const* inputs, void* output, void* space, cudaStream_t stream)
{
    FusedMoeParams params{};
    params.type = type;
    params.rows = sizes.rows();
    params.hidden = sizes[schema::kIn];
    params.inter = sizes[schema::kInter];
    params.hiddenStates = inputs[kHiddenStates];
    params.visualMask = static_cast<bool const*>(inputs[kVisualMask]);
    params.textGateUp.data = inputs[kTextGateUp];
    params.textDown.data = inputs[kTextDown];
    params.visualGateUp.data = inputs[kVisualGateUp];
    params.visualDown.data = inputs[kVisualDown];
    params.output = output;
    params.workspace = space;
    params.workspaceSize = workspace(sizes);
    return fusedMoe(params, stream);
}

} // namespace FusedMoE

namespace ExpertLinear
{

using namespace schema::ExpertLinear;

std::size_t workspace(Sizes const& sizes)
{
    return expertLinearWorkspace(sizes.rows(), sizes[schema::kIn], sizes[schema::kOut]);
}

cudaError_t enqueue(
    Sizes const& sizes, Type type, void const* const* inputs, void* output, void* space, cudaStream_t stream)
{
    ExpertLinearParams params{};
    params.type = type;
    params.rows = sizes.rows();
    params.in = sizes[schema::kIn];
    params.out = sizes[schema::kOut];
    params.hiddenStates = inputs[kHiddenStates];
    params.visualMask = static_cast<bool const*>(inputs[kVisualMask]);
    params.text.data = inputs[kTextWeight];
    params.visual.data = inputs[kVisualWeight];
    params.output = output;
    params.workspace = space;
    params.workspaceSize = workspace(sizes);
    return expertLinear(params, stream);
}

} // namespace ExpertLinear

} // namespace

// workspaceSize above is what these rows need. What TensorRT set aside, for the profile's maximum, is no less, since
// the kernels' need grows with each size.
Operation const gOperations[kOperations]{
    {schema::FusedMoE::kOperator, FusedMoE::workspace, FusedMoE::enqueue},
    {schema::ExpertLinear::kOperator, ExpertLinear::workspace, ExpertLinear::enqueue},
};

} // namespace monoedge::trt
