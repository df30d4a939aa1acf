#include "operation.h"

namespace monoedge::trt
{

namespace
{

/// The matrix that is an operator's i-th input, in the format that its definition gives it.
Weight weight(schema::Operator const& op, void const* const* inputs, std::int32_t i)
{
    auto const scale = [&](std::int32_t index) {
        return index == schema::kNone ? nullptr : static_cast<float const*>(inputs[index]);
    };
    schema::Tensor const& tensor = op.inputs[i];
    return {inputs[i], scale(tensor.scale), scale(tensor.inputScale)};
}

/// Parameters with what all families have. workspaceSize is what these rows need. TensorRT set aside at least as much,
/// for the profile's maximum, since the need grows with each size.
template <typename Params>
Params common(schema::Operator const& op, Sizes const& sizes, Type type, void const* const* inputs, void* output,
    void* workspace)
{
    Params params{};
    params.type = type;
    params.rows = sizes.rows();
    params.hiddenStates = inputs[schema::FusedMoE::kHiddenStates];
    params.visualMask = static_cast<bool const*>(inputs[schema::FusedMoE::kVisualMask]);
    params.output = output;
    params.workspace = workspace;
    params.workspaceSize = workspaceSize(op, sizes);
    return params;
}

static_assert(schema::FusedMoE::kHiddenStates == 0 && schema::ExpertLinear::kHiddenStates == 0);
static_assert(schema::FusedMoE::kVisualMask == 1 && schema::ExpertLinear::kVisualMask == 1);

} // namespace

std::size_t workspaceSize(schema::Operator const& op, Sizes const& sizes)
{
    switch (op.family)
    {
    case schema::Family::kFusedMoE: return fusedMoeWorkspace(sizes.rows(), sizes[schema::kIn], sizes[schema::kInter]);
    case schema::Family::kExpertLinear:
        return expertLinearWorkspace(sizes.rows(), sizes[schema::kIn], sizes[schema::kOut]);
    }
    return 0;
}

cudaError_t enqueue(schema::Operator const& op, Sizes const& sizes, Type type, void const* const* inputs, void* output,
    void* workspace, cudaStream_t stream)
{
    switch (op.family)
    {
    case schema::Family::kFusedMoE:
    {
        using namespace schema::FusedMoE;
        auto params = common<FusedMoeParams>(op, sizes, type, inputs, output, workspace);
        params.hidden = sizes[schema::kIn];
        params.inter = sizes[schema::kInter];
        params.textGateUp = weight(op, inputs, kTextGateUp);
        params.textDown = weight(op, inputs, kTextDown);
        params.visualGateUp = weight(op, inputs, kVisualGateUp);
        params.visualDown = weight(op, inputs, kVisualDown);
        return fusedMoe(params, stream);
    }
    case schema::Family::kExpertLinear:
    {
        using namespace schema::ExpertLinear;
        auto params = common<ExpertLinearParams>(op, sizes, type, inputs, output, workspace);
        params.in = sizes[schema::kIn];
        params.out = sizes[schema::kOut];
        params.text = weight(op, inputs, kTextWeight);
        params.visual = weight(op, inputs, kVisualWeight);
        return expertLinear(params, stream);
    }
    }
    return cudaErrorInvalidValue;
}

} // namespace monoedge::trt
