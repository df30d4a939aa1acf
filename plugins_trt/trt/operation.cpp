#include "operation.h"

#include <type_traits>
#include <vector>

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

namespace
{

constexpr char const* kSlow{"; the kernels for anything else are many times slower: "};

/// Calls a function with the parameters of the kernels.
template <typename Function>
auto withParams(schema::Operator const& op, Call const& call, Function&& function)
{
    // An input by its name in the definition; null where the operator has none of that name.
    auto const find = [&](std::string const& name) -> void const* {
        for (std::int32_t i = 0; i < op.nbInputs; ++i)
        {
            if (name == op.inputs[i].name)
            {
                return call.inputs[i];
            }
        }
        return nullptr;
    };
    auto const scale = [&](std::string const& name) { return static_cast<float const*>(find(name)); };
    auto const weight = [&](std::string const& name) {
        return Weight{find(name), scale(name + "_scale"), scale(name + "_input_scale")};
    };
    Sizes const& sizes = call.sizes;
    void const* const hiddenStates = find("hidden_states");
    auto const* const visualMask = static_cast<bool const*>(find("visual_mask"));
    // What these rows need. TensorRT set aside at least as much, for the profile's maximum: the need grows with each
    // size.
    std::size_t const size = workspaceSize(op, sizes);
    if (op.family == schema::Family::kFusedMoE)
    {
        return function(FusedMoeParams{call.type, sizes.rows(), sizes[schema::kIn], sizes[schema::kInter], hiddenStates,
            visualMask, weight("text_gate_up"), weight("text_down"), weight("visual_gate_up"), weight("visual_down"),
            call.output, call.workspace, size});
    }
    return function(ExpertLinearParams{call.type, sizes.rows(), sizes[schema::kIn], sizes[schema::kOut], hiddenStates,
        visualMask, weight("text_weight"), weight("visual_weight"), call.output, call.workspace, size});
}

} // namespace

Outcome enqueue(schema::Operator const& op, Call const& call, cudaStream_t stream)
{
    return withParams(op, call, [=](auto const& params) {
        bool const fast = params.rows == 0 || monoedge::isFast(params);
        if constexpr (std::is_same_v<decltype(params), FusedMoeParams const&>)
        {
            return Outcome{fusedMoe(params, stream), fast};
        }
        else
        {
            return Outcome{expertLinear(params, stream), fast};
        }
    });
}

bool isFast(schema::Operator const& op, Sizes const& sizes)
{
    alignas(kAlignment) static char anywhere[kAlignment]; // Nothing is read there.
    std::vector<void const*> const inputs(static_cast<std::size_t>(op.nbInputs), anywhere);
    Call const call{sizes, Type::kBFloat16, inputs.data(), anywhere, anywhere};
    return withParams(op, call, [](auto const& params) { return monoedge::isFast(params); });
}

std::string whySlow(Sizes const& sizes)
{
    return "sizes must be multiples of 8, and of 16 where rows of int8 matrices are summed, got " + sizes.describe()
        + kSlow + "pad the matrices with zeros";
}

std::string whySlow(schema::Operator const& op, Call const& call)
{
    for (std::int32_t i = 0; i <= op.nbInputs; ++i)
    {
        schema::Tensor const& tensor = op.tensor(i);
        bool const isWide = tensor.kind == schema::Kind::kT || tensor.kind == schema::Kind::kInt8;
        void const* const address = i < op.nbInputs ? call.inputs[i] : call.output;
        std::size_t const behind = reinterpret_cast<std::uintptr_t>(address) % kAlignment;
        if (isWide && behind != 0)
        {
            return std::string{tensor.name} + " must begin at a multiple of " + std::to_string(kAlignment)
                + " bytes, got an address " + std::to_string(behind) + " bytes behind one" + kSlow
                + "bind memory that begins where cudaMalloc's does";
        }
    }
    return whySlow(call.sizes);
}

} // namespace monoedge::trt
