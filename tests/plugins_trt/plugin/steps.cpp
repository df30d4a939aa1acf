// Plays TensorRT's part towards the plugin, one call at a time, as C functions for steps.py. Objects are pointers to
// IPluginV3, and stepsRelease ends each.

#include "../../../plugins_trt/trt/exports.h"

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

std::string gLog;

/// Keeps each record as one line, behind its severity.
class Logger final : public ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        gLog += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
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

template <typename Capability>
Capability& capability(IPluginV3* plugin, PluginCapabilityType type)
{
    return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

IPluginV3OneBuild& build(IPluginV3* plugin)
{
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime& runtime(IPluginV3* plugin)
{
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

} // namespace

/// A tensor: as the network or a call knows it, and its least and most size in a profile.
struct StepsTensor
{
    std::int32_t type;
    std::int32_t format;
    std::int32_t rank;
    std::int64_t shape[Dims::MAX_DIMS];
    std::int64_t least[Dims::MAX_DIMS];
    std::int64_t most[Dims::MAX_DIMS];
};

namespace
{

Dims dims(std::int32_t rank, std::int64_t const* sizes)
{
    Dims result{};
    result.nbDims = rank;
    std::memcpy(result.d, sizes, sizeof result.d);
    return result;
}

std::vector<PluginTensorDesc> descs(StepsTensor const* tensors, std::int32_t count)
{
    std::vector<PluginTensorDesc> result;
    for (StepsTensor const* tensor = tensors; tensor != tensors + count; ++tensor)
    {
        PluginTensorDesc desc{};
        desc.dims = dims(tensor->rank, tensor->shape);
        desc.type = static_cast<DataType>(tensor->type);
        desc.format = static_cast<TensorFormat>(tensor->format);
        result.push_back(desc);
    }
    return result;
}

std::vector<DynamicPluginTensorDesc> profile(StepsTensor const* tensors, std::int32_t count)
{
    std::vector<DynamicPluginTensorDesc> result;
    for (PluginTensorDesc const& desc : descs(tensors, count))
    {
        StepsTensor const& tensor = tensors[result.size()];
        Dims const most = dims(tensor.rank, tensor.most);
        result.push_back({desc, dims(tensor.rank, tensor.least), most, most});
    }
    return result;
}

/// Fields as a plan keeps them: copies, which need nothing of the plugin that they come from.
struct Fields
{
    std::vector<std::string> names;
    std::vector<std::vector<char>> data;
    std::vector<PluginField> fields;
};

std::size_t sizeOf(PluginFieldType type)
{
    switch (type)
    {
    case PluginFieldType::kFLOAT64:
    case PluginFieldType::kINT64: return 8;
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32: return 4;
    case PluginFieldType::kFLOAT16:
    case PluginFieldType::kBF16:
    case PluginFieldType::kINT16: return 2;
    default: return 1;
    }
}

} // namespace

extern "C"
{
    void stepsUseLogger(bool used)
    {
        setLoggerFinder(used ? &gFinder : nullptr);
    }

    /// What was logged since the last call.
    char const* stepsLog()
    {
        static std::string last;
        last = std::move(gLog);
        gLog.clear();
        return last.c_str();
    }

    /// A plugin of an operator as the ONNX parser asks for it, or, with fields, as a plan does. Null: refused.
    IPluginV3* stepsCreate(char const* op, char const* node, Fields const* fields)
    {
        std::int32_t count{0};
        IPluginCreatorInterface* const* const creators = getCreators(count);
        for (std::int32_t i = 0; i < count; ++i)
        {
            auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
            if (std::strcmp(creator->getPluginName(), op) == 0)
            {
                PluginFieldCollection collection{};
                if (fields != nullptr)
                {
                    collection = {static_cast<std::int32_t>(fields->fields.size()), fields->fields.data()};
                }
                TensorRTPhase const phase = fields == nullptr ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME;
                return creator->createPlugin(node, &collection, phase);
            }
        }
        return nullptr;
    }

    void stepsRelease(IPluginV3* plugin)
    {
        delete plugin;
    }

    IPluginV3* stepsClone(IPluginV3* plugin)
    {
        return plugin->clone();
    }

    bool stepsSupports(IPluginV3* plugin, std::int32_t position, StepsTensor const* tensors, std::int32_t nbInputs)
    {
        return build(plugin).supportsFormatCombination(position, profile(tensors, nbInputs + 1).data(), nbInputs, 1);
    }

    std::int32_t stepsConfigure(IPluginV3* plugin, StepsTensor const* tensors, std::int32_t nbInputs)
    {
        auto const all = profile(tensors, nbInputs + 1);
        return build(plugin).configurePlugin(all.data(), nbInputs, &all.back(), 1);
    }

    std::size_t stepsWorkspace(IPluginV3* plugin, StepsTensor const* tensors, std::int32_t nbInputs)
    {
        auto const all = profile(tensors, nbInputs + 1);
        return build(plugin).getWorkspaceSize(all.data(), nbInputs, &all.back(), 1);
    }

    Fields* stepsSerialize(IPluginV3* plugin)
    {
        PluginFieldCollection const& given = *runtime(plugin).getFieldsToSerialize();
        auto result = std::make_unique<Fields>();
        for (std::int32_t i = 0; i < given.nbFields; ++i)
        {
            PluginField const& field = given.fields[i];
            auto const* const begin = static_cast<char const*>(field.data);
            result->names.emplace_back(field.name);
            result->data.emplace_back(begin, begin + static_cast<std::size_t>(field.length) * sizeOf(field.type));
            result->fields.push_back(field);
        }
        for (std::size_t i = 0; i < result->fields.size(); ++i)
        {
            result->fields[i].name = result->names[i].c_str();
            result->fields[i].data = result->data[i].data();
        }
        return result.release();
    }

    void stepsForget(Fields* fields)
    {
        delete fields;
    }

    IPluginV3* stepsAttach(IPluginV3* plugin)
    {
        return runtime(plugin).attachToContext(nullptr);
    }

    std::int32_t stepsShapeChange(IPluginV3* plugin, StepsTensor const* tensors, std::int32_t nbInputs)
    {
        auto const all = descs(tensors, nbInputs + 1);
        return runtime(plugin).onShapeChange(all.data(), nbInputs, &all.back(), 1);
    }

    std::int32_t stepsEnqueue(IPluginV3* plugin, StepsTensor const* tensors, std::int32_t nbInputs,
        void const* const* inputs, void* output, void* workspace)
    {
        auto const all = descs(tensors, nbInputs + 1);
        void* const outputs[]{output};
        return runtime(plugin).enqueue(all.data(), &all.back(), inputs, outputs, workspace, nullptr);
    }
}
