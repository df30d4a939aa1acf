// Plays TensorRT's part towards the plugin library, from the creator to enqueue, behind C functions: one node, built
// and then run on pointers of the caller. Where they point to is the caller's matter: to a GPU's memory, or to the
// host's where the kernels are emulated.

#include "../../plugins_trt/trt/exports.h"
#include "../../plugins_trt/trt/schema.h"

#include <NvInferRuntime.h>

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;
namespace schema = monoedge::schema;

namespace
{

class Logger final : public ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        if (severity <= Severity::kWARNING)
        {
            std::fprintf(stderr, "%s\n", message);
        }
    }
} gLogger;

class Finder final : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return &gLogger;
    }
} gFinder;

void expect(bool holds, std::string const& what)
{
    if (!holds)
    {
        throw std::runtime_error(what);
    }
}

IPluginCreatorV3One& creatorOf(std::string const& op)
{
    std::int32_t count{0};
    IPluginCreatorInterface* const* const creators = getCreators(count);
    for (std::int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (op == creator->getPluginName())
        {
            return *creator;
        }
    }
    throw std::runtime_error("the library has no plugin " + op);
}

schema::Operator const& definitionOf(std::string const& op)
{
    for (schema::Operator const& candidate : schema::kOperators)
    {
        if (op == candidate.name)
        {
            return candidate;
        }
    }
    throw std::runtime_error("the definition has no operator " + op);
}

/// One node, as TensorRT takes it through building and running.
class Node
{
public:
    /// `sizes` has batch, sequence, in, inter, out; the profile's maximum is these.
    Node(std::string const& op, DataType type, std::int64_t const* sizes)
    {
        describe(definitionOf(op), type, sizes);
        auto const nbInputs = static_cast<std::int32_t>(mDescs.size()) - 1;
        IPluginCreatorV3One& creator = creatorOf(op);
        PluginFieldCollection none{};
        std::unique_ptr<IPluginV3> const built{creator.createPlugin(op.c_str(), &none, TensorRTPhase::kBUILD)};
        expect(built != nullptr, "createPlugin gave nothing");
        auto& build = capability<IPluginV3OneBuild>(*built, PluginCapabilityType::kBUILD);
        for (std::int32_t i = 0; i <= nbInputs; ++i)
        {
            expect(build.supportsFormatCombination(i, mBuildDescs.data(), nbInputs, 1), "a format is refused");
        }
        DataType output{};
        std::vector<DataType> types;
        for (std::int32_t i = 0; i < nbInputs; ++i)
        {
            types.push_back(mDescs[i].type);
        }
        expect(build.getOutputDataTypes(&output, 1, types.data(), nbInputs) == 0, "getOutputDataTypes failed");
        expect(output == type, "the output has another type");
        expect(build.configurePlugin(mBuildDescs.data(), nbInputs, &mBuildDescs.back(), 1) == 0,
            "configurePlugin failed");
        mWorkspaceSize = build.getWorkspaceSize(mBuildDescs.data(), nbInputs, &mBuildDescs.back(), 1);

        // A plan keeps the fields; the process that opens it makes the plugin of them, and one for each context.
        auto& serializing = capability<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME);
        mOpened.reset(creator.createPlugin(op.c_str(), serializing.getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
        expect(mOpened != nullptr, "createPlugin gave nothing at runtime");
        auto& opened = capability<IPluginV3OneRuntime>(*mOpened, PluginCapabilityType::kRUNTIME);
        mAttached.reset(opened.attachToContext(nullptr));
        expect(mAttached != nullptr, "attachToContext gave nothing");
        auto& runtime = capability<IPluginV3OneRuntime>(*mAttached, PluginCapabilityType::kRUNTIME);
        expect(runtime.onShapeChange(mDescs.data(), nbInputs, &mDescs.back(), 1) == 0, "onShapeChange failed");
    }

    std::size_t workspaceSize() const
    {
        return mWorkspaceSize;
    }

    std::int32_t enqueue(void const* const* inputs, void* output, void* workspace, cudaStream_t stream)
    {
        auto& runtime = capability<IPluginV3OneRuntime>(*mAttached, PluginCapabilityType::kRUNTIME);
        return runtime.enqueue(mDescs.data(), &mDescs.back(), inputs, &output, workspace, stream);
    }

private:
    template <typename Capability>
    static Capability& capability(IPluginV3& plugin, PluginCapabilityType type)
    {
        auto* const found = static_cast<Capability*>(plugin.getCapabilityInterface(type));
        expect(found != nullptr, "the plugin lacks a capability");
        return *found;
    }

    /// Inputs, then the output.
    void describe(schema::Operator const& definition, DataType type, std::int64_t const* sizes)
    {
        for (std::int32_t i = 0; i <= definition.nbInputs; ++i)
        {
            schema::Tensor const& tensor = i < definition.nbInputs ? definition.inputs[i] : definition.output;
            DynamicPluginTensorDesc desc{};
            desc.max.nbDims = tensor.rank;
            for (std::int32_t axis = 0; axis < tensor.rank; ++axis)
            {
                desc.max.d[axis] = tensor.shape[axis].factor * sizes[tensor.shape[axis].dim];
            }
            desc.desc.dims = desc.min = desc.opt = desc.max;
            desc.desc.type = tensor.kind == schema::Kind::kBool ? DataType::kBOOL
                : tensor.kind == schema::Kind::kInt8            ? DataType::kINT8
                : tensor.kind == schema::Kind::kFloat32         ? DataType::kFLOAT
                                                                : type;
            desc.desc.format = TensorFormat::kLINEAR;
            mBuildDescs.push_back(desc);
            mDescs.push_back(desc.desc);
        }
    }

    std::vector<DynamicPluginTensorDesc> mBuildDescs;
    std::vector<PluginTensorDesc> mDescs;
    std::unique_ptr<IPluginV3> mOpened;
    std::unique_ptr<IPluginV3> mAttached;
    std::size_t mWorkspaceSize{0};
};

} // namespace

/// Null where something is refused; the reason goes to standard error. `isBFloat16` is 0 for float16.
extern "C" void* monoedgePluginOpen(char const* op, int isBFloat16, std::int64_t const* sizes)
{
    setLoggerFinder(&gFinder);
    try
    {
        return new Node(op, isBFloat16 != 0 ? DataType::kBF16 : DataType::kHALF, sizes);
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "%s: %s\n", op, error.what());
        return nullptr;
    }
}

extern "C" std::size_t monoedgePluginWorkspace(void* node)
{
    return static_cast<Node*>(node)->workspaceSize();
}

extern "C" int monoedgePluginEnqueue(
    void* node, void const* const* inputs, void* output, void* workspace, cudaStream_t stream)
{
    return static_cast<Node*>(node)->enqueue(inputs, output, workspace, stream);
}

extern "C" void monoedgePluginClose(void* node)
{
    delete static_cast<Node*>(node);
}
