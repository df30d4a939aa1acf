// A node of the operator family inside TensorRT, and what makes such nodes.

#include "exports.h"
#include "operation.h"
#include "report.h"

#include <utility>
#include <vector>

namespace monoedge::trt
{

namespace
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

/// Asked for where no size can be worked out. No device has that much, so the build stops.
constexpr std::size_t kImpossibleWorkspace{std::size_t{1} << 62};

/// What to do about a failed launch, where that is known.
char const* remedy(cudaError_t status)
{
    bool const isForeign = status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion;
    return isForeign ? "; build the library for this GPU: monoedge plugin" : "";
}

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

/// What TensorRT asks plugins and what makes them alike: which operator they are of.
template <typename Interface>
class OfOperator : public Interface
{
public:
    explicit OfOperator(schema::Operator const& definition)
        : mDefinition{definition}
    {
    }

    char const* getPluginName() const noexcept override
    {
        return mDefinition.name;
    }

    char const* getPluginVersion() const noexcept override
    {
        return schema::kVersion;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return schema::kNamespace;
    }

protected:
    schema::Operator const& mDefinition;
    PluginFieldCollection mNoFields{}; ///< Always none: sizes and types come with every call.
};

/// Translates TensorRT's calls and checks what comes with them, nothing more. `node` is its name in messages.
class ExpertPlugin final : public nvinfer1::IPluginV3,
                           public OfOperator<IPluginV3OneCore>,
                           public IPluginV3OneBuild,
                           public IPluginV3OneRuntime
{
public:
    ExpertPlugin(schema::Operator const& definition, std::string node)
        : OfOperator{definition}
        , mNode{std::move(node)}
    {
    }

    nvinfer1::IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        nvinfer1::IPluginV3* copy{nullptr};
        guarded(mNode, [&] { copy = new ExpertPlugin(mDefinition, mNode); });
        return copy;
    }

    // Build

    std::int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }

    std::int32_t getOutputDataTypes(DataType* outputTypes, std::int32_t nbOutputs, DataType const* inputTypes,
        std::int32_t nbInputs) const noexcept override
    {
        return guarded(mNode, [&] {
            checkCounts(mDefinition, nbInputs, nbOutputs);
            for (std::int32_t i = 0; i < nbInputs; ++i)
            {
                checkType(mDefinition.inputs[i], inputTypes[i], inputTypes[0]);
            }
            outputTypes[0] = inputTypes[0];
        });
    }

    std::int32_t getOutputShapes(DimsExprs const* inputs, std::int32_t nbInputs, DimsExprs const*, std::int32_t,
        DimsExprs* outputs, std::int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override
    {
        return guarded(mNode, [&] {
            checkCounts(mDefinition, nbInputs, nbOutputs);
            Sizes const sizes = bindAll(mDefinition, nbInputs, [&](std::int32_t i) { return known(inputs[i]); });
            schema::Tensor const& output = mDefinition.output;
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

    /// TensorRT tries combinations here: a "no" is no error, and nothing is reported.
    bool supportsFormatCombination(std::int32_t pos, DynamicPluginTensorDesc const* inOut, std::int32_t nbInputs,
        std::int32_t nbOutputs) noexcept override
    {
        if (nbInputs != mDefinition.nbInputs || nbOutputs != 1)
        {
            return false;
        }
        return formatFits(mDefinition.tensor(pos), inOut[pos].desc, inOut[0].desc.type);
    }

    std::int32_t configurePlugin(DynamicPluginTensorDesc const* in, std::int32_t nbInputs,
        DynamicPluginTensorDesc const* out, std::int32_t nbOutputs) noexcept override
    {
        return guarded(mNode, [&] {
            checkCounts(mDefinition, nbInputs, nbOutputs);
            auto const tensor = [&](std::int32_t i) -> DynamicPluginTensorDesc const& {
                return i < nbInputs ? in[i] : out[0];
            };
            checkFormats(mDefinition, [&](std::int32_t i) -> PluginTensorDesc const& { return tensor(i).desc; });
            bindAll(mDefinition, nbInputs + 1, [&](std::int32_t i) { return tensor(i).desc.dims; });
            Sizes const most = bindAll(mDefinition, nbInputs + 1, [&](std::int32_t i) { return tensor(i).max; });
            most.requireAll(mDefinition);
            if (!isFast(mDefinition, most))
            {
                warnOnce(mNode.c_str(), whySlow(most).c_str());
            }
        });
    }

    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, std::int32_t nbInputs,
        DynamicPluginTensorDesc const*, std::int32_t nbOutputs) const noexcept override
    {
        std::size_t size{kImpossibleWorkspace};
        guarded(mNode, [&] {
            checkCounts(mDefinition, nbInputs, nbOutputs);
            Sizes const sizes = bindAll(mDefinition, nbInputs, [&](std::int32_t i) { return inputs[i].max; });
            sizes.requireAll(mDefinition);
            size = workspaceSize(mDefinition, sizes);
            std::string const message = "workspace of " + std::to_string(size) + " bytes for up to " + sizes.describe();
            report(nvinfer1::ILogger::Severity::kVERBOSE, mNode.c_str(), message.c_str());
        });
        return size;
    }

    // Runtime

    std::int32_t onShapeChange(PluginTensorDesc const* in, std::int32_t nbInputs, PluginTensorDesc const* out,
        std::int32_t nbOutputs) noexcept override
    {
        return guarded(mNode, [&] {
            checkCounts(mDefinition, nbInputs, nbOutputs);
            checkCall(in, out);
        });
    }

    std::int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(mNode, [&] {
            Type const type = inputDesc[0].type == DataType::kHALF ? Type::kFloat16 : Type::kBFloat16;
            Call const call{checkCall(inputDesc, outputDesc), type, inputs, outputs[0], workspace};
            auto const [status, fast] = trt::enqueue(mDefinition, call, stream);
            if (status != cudaSuccess)
            {
                throw Refusal(std::string{mDefinition.name} + " could not be launched: " + cudaGetErrorName(status)
                    + " (" + cudaGetErrorString(status) + ") with " + call.sizes.describe() + remedy(status));
            }
            if (!fast)
            {
                warnOnce(mNode.c_str(), whySlow(mDefinition, call).c_str());
            }
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &mNoFields;
    }

private:
    /// Checks the tensors of a call and returns their sizes.
    Sizes checkCall(PluginTensorDesc const* in, PluginTensorDesc const* out) const
    {
        auto const desc = [&](std::int32_t i) -> PluginTensorDesc const& {
            return i < mDefinition.nbInputs ? in[i] : out[0];
        };
        checkFormats(mDefinition, desc);
        Sizes const sizes = bindAll(mDefinition, mDefinition.nbInputs + 1, [&](std::int32_t i) { return desc(i).dims; });
        sizes.requireAll(mDefinition);
        return sizes;
    }

    std::string mNode;
};

/// Makes plugins of one operator, for TensorRT's ONNX parser and for plans that hold one.
class ExpertPluginCreator final : public OfOperator<nvinfer1::IPluginCreatorV3One>
{
public:
    using OfOperator::OfOperator;

    nvinfer1::IPluginV3* createPlugin(
        char const* name, PluginFieldCollection const* fc, nvinfer1::TensorRTPhase) noexcept override
    {
        nvinfer1::IPluginV3* plugin{nullptr};
        auto const make = [&] {
            if (fc != nullptr && fc->nbFields != 0)
            {
                throw Refusal(std::string{mDefinition.name} + " version " + schema::kVersion
                    + " takes no fields, got " + fc->fields[0].name + "; use the plugin that the plan was built with");
            }
            bool const named = name != nullptr && *name != '\0';
            plugin = new ExpertPlugin(mDefinition, named ? name : mDefinition.name);
        };
        guarded(name == nullptr ? "" : name, make);
        return plugin;
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mNoFields;
    }
};

} // namespace

} // namespace monoedge::trt

nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& nbCreators)
{
    // Never freed: TensorRT may ask them until the process ends.
    static std::vector<nvinfer1::IPluginCreatorInterface*> const creators = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> result;
        for (auto const& definition : monoedge::schema::kOperators)
        {
            result.push_back(new monoedge::trt::ExpertPluginCreator{definition});
        }
        return result;
    }();
    nbCreators = static_cast<std::int32_t>(creators.size());
    return creators.data();
}
