#include "operation.h"

namespace monoedge::trt
{

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
    // An input by its name in the definition; null where the operator has none of that name.
    auto const find = [&](std::string const& name) -> void const* {
        for (std::int32_t i = 0; i < op.nbInputs; ++i)
        {
            if (name == op.inputs[i].name)
            {
                return inputs[i];
            }
        }
        return nullptr;
    };
    auto const scale = [&](std::string const& name) { return static_cast<float const*>(find(name)); };
    auto const weight = [&](std::string const& name) {
        return Weight{find(name), scale(name + "_scale"), scale(name + "_input_scale")};
    };
    void const* const hiddenStates = find("hidden_states");
    auto const* const visualMask = static_cast<bool const*>(find("visual_mask"));
    // What these rows need. TensorRT set aside at least as much, for the profile's maximum: the need grows with each
    // size.
    std::size_t const size = workspaceSize(op, sizes);
    switch (op.family)
    {
    case schema::Family::kFusedMoE:
        return fusedMoe({type, sizes.rows(), sizes[schema::kIn], sizes[schema::kInter], hiddenStates, visualMask,
                            weight("text_gate_up"), weight("text_down"), weight("visual_gate_up"),
                            weight("visual_down"), output, workspace, size},
            stream);
    case schema::Family::kExpertLinear:
        return expertLinear({type, sizes.rows(), sizes[schema::kIn], sizes[schema::kOut], hiddenStates, visualMask,
                                weight("text_weight"), weight("visual_weight"), output, workspace, size},
            stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace monoedge::trt
