#include "plugin.h"

#include "operation.h"
#include "report.h"

#include <utility>

namespace monoedge::trt
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginTensorDesc;

namespace
{

/// Asked for where no size can be worked out: no device has it, so that the build stops.
constexpr std::size_t kImpossibleWorkspace{std::size_t{1} << 62};

/// The dimensions that are constants in the network, the others as unknown.
Dims known(DimsExprs const& shape)
{
    Dims result{};
    result.nbDims = shape.nbDims;
    for (std::int32_t i = 0; i < shape.nbDims; ++i)
    {
        result.d[i] = shape.d[i]->isConstant() ? shape.d[i]->getConstantValue() : kUnknown;
    }
    return result;
}

/// Binds all inputs of an operator, and its output where there is one; `dims(i)` is the shape of the i-th.
template <typename Shape>
Sizes bindAll(schema::Operator const& op, std::int32_t count, Shape&& dims)
{
    Sizes sizes;
    for (std::int32_t i = 0; i < count; ++i)
    {
        sizes.bind(i < op.nbInputs ? op.inputs[i] : op.output, dims(i));
    }
    return sizes;
}

Type coreType(DataType type)
{
    return type == DataType::kHALF ? Type::kFloat16 : Type::kBFloat16;
}

} // namespace

ExpertPlugin::ExpertPlugin(schema::Operator const& definition, std::string node)
    : mDefinition{&definition}
    , mNode{std::move(node)}
{
}

nvinfer1::IPluginCapability* ExpertPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* ExpertPlugin::clone() noexcept
{
    IPluginV3* copy{nullptr};
    guarded(mNode, [&] { copy = new ExpertPlugin(definition(), mNode); });
    return copy;
}

char const* ExpertPlugin::getPluginName() const noexcept
{
    return definition().name;
}

char const* ExpertPlugin::getPluginVersion() const noexcept
{
    return schema::kVersion;
}

char const* ExpertPlugin::getPluginNamespace() const noexcept
{
    return schema::kNamespace;
}

std::int32_t ExpertPlugin::getNbOutputs() const noexcept
{
    return 1;
}

std::int32_t ExpertPlugin::getOutputDataTypes(DataType* outputTypes, std::int32_t nbOutputs, DataType const* inputTypes,
    std::int32_t nbInputs) const noexcept
{
    return guarded(mNode, [&] {
        checkCounts(definition(), nbInputs, nbOutputs);
        for (std::int32_t i = 0; i < nbInputs; ++i)
        {
            checkType(definition().inputs[i], inputTypes[i], inputTypes[0]);
        }
        outputTypes[0] = inputTypes[0];
    });
}

std::int32_t ExpertPlugin::getOutputShapes(DimsExprs const* inputs, std::int32_t nbInputs, DimsExprs const*,
    std::int32_t, DimsExprs* outputs, std::int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept
{
    return guarded(mNode, [&] {
        checkCounts(definition(), nbInputs, nbOutputs);
        Sizes const sizes = bindAll(definition(), nbInputs, [&](std::int32_t i) { return known(inputs[i]); });
        schema::Tensor const& output = definition().output;
        outputs[0].nbDims = output.rank;
        for (std::int32_t i = 0; i < output.rank; ++i)
        {
            // Leading dimensions are those of the rows; the last is a weight's, and a weight has no unknown ones.
            auto const dim = static_cast<schema::Dim>(output.shape[i].dim);
            bool const leading = i < output.rank - 1;
            outputs[0].d[i] = leading ? inputs[0].d[i] : exprBuilder.constant(sizes[dim]);
        }
    });
}

bool ExpertPlugin::supportsFormatCombination(std::int32_t pos, DynamicPluginTensorDesc const* inOut,
    std::int32_t nbInputs, std::int32_t nbOutputs) noexcept
{
    // TensorRT tries combinations here, so that a "no" is no error and nothing is reported.
    if (nbInputs != definition().nbInputs || nbOutputs != 1)
    {
        return false;
    }
    schema::Tensor const& tensor = pos < nbInputs ? definition().inputs[pos] : definition().output;
    PluginTensorDesc const& desc = inOut[pos].desc;
    return desc.format == nvinfer1::TensorFormat::kLINEAR && typeFits(tensor, desc.type, inOut[0].desc.type);
}

std::int32_t ExpertPlugin::configurePlugin(DynamicPluginTensorDesc const* in, std::int32_t nbInputs,
    DynamicPluginTensorDesc const* out, std::int32_t nbOutputs) noexcept
{
    return guarded(mNode, [&] {
        checkCounts(definition(), nbInputs, nbOutputs);
        for (std::int32_t i = 0; i < nbInputs; ++i)
        {
            checkType(definition().inputs[i], in[i].desc.type, in[0].desc.type);
        }
        checkType(definition().output, out[0].desc.type, in[0].desc.type);
        auto const tensor = [&](std::int32_t i) -> DynamicPluginTensorDesc const& {
            return i < nbInputs ? in[i] : out[0];
        };
        bindAll(definition(), nbInputs + 1, [&](std::int32_t i) { return tensor(i).desc.dims; });
        bindAll(definition(), nbInputs + 1, [&](std::int32_t i) { return tensor(i).max; });
    });
}

std::size_t ExpertPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, std::int32_t nbInputs,
    DynamicPluginTensorDesc const*, std::int32_t nbOutputs) const noexcept
{
    std::size_t size{kImpossibleWorkspace};
    guarded(mNode, [&] {
        checkCounts(definition(), nbInputs, nbOutputs);
        Sizes const sizes = bindAll(definition(), nbInputs, [&](std::int32_t i) { return inputs[i].max; });
        size = workspaceSize(definition(), sizes);
        std::string const message = "workspace of " + std::to_string(size) + " bytes for up to " + sizes.describe();
        report(nvinfer1::ILogger::Severity::kVERBOSE, mNode.c_str(), message.c_str());
    });
    return size;
}

std::int32_t ExpertPlugin::onShapeChange(PluginTensorDesc const* in, std::int32_t nbInputs, PluginTensorDesc const* out,
    std::int32_t nbOutputs) noexcept
{
    return guarded(mNode, [&] {
        checkCounts(definition(), nbInputs, nbOutputs);
        bindAll(definition(), nbInputs + 1, [&](std::int32_t i) { return i < nbInputs ? in[i].dims : out[0].dims; });
    });
}

std::int32_t ExpertPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded(mNode, [&] {
        Sizes const sizes
            = bindAll(definition(), definition().nbInputs, [&](std::int32_t i) { return inputDesc[i].dims; });
        cudaError_t const status = trt::enqueue(
            definition(), sizes, coreType(inputDesc[0].type), inputs, outputs[0], workspace, stream);
        if (status != cudaSuccess)
        {
            throw Refusal(std::string{definition().name} + " could not be launched: " + cudaGetErrorName(status) + " ("
                + cudaGetErrorString(status) + ") with " + sizes.describe());
        }
    });
}

IPluginV3* ExpertPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    return clone();
}

nvinfer1::PluginFieldCollection const* ExpertPlugin::getFieldsToSerialize() noexcept
{
    return &mNoFields;
}

} // namespace monoedge::trt
