// Plays TensorRT's part towards the plugin library, on a machine with neither TensorRT nor a GPU, and prints what it
// gets as lines "key: value" for test_plugin.py.

#include "../../../plugins_trt/trt/exports.h"
#include "../../../plugins_trt/trt/schema.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;
namespace schema = monoedge::schema;

namespace
{

/// batch, sequence, in, inter, out
constexpr std::int64_t kSizes[schema::kDims]{2, 0, 64, 96, 32};

class Logger final : public ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        std::printf("log %d: %s\n", static_cast<int>(severity), message);
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

schema::Operator const& operatorNamed(std::string const& op)
{
    return *std::find_if(std::begin(schema::kOperators), std::end(schema::kOperators),
        [&](schema::Operator const& candidate) { return op == candidate.name; });
}

/// A node's inputs and then its output, for up to `sequence` tokens, T being `type`.
std::vector<DynamicPluginTensorDesc> tensors(std::string const& op, std::int64_t sequence, DataType type)
{
    schema::Operator const& definition = operatorNamed(op);
    std::vector<DynamicPluginTensorDesc> result;
    for (std::int32_t i = 0; i <= definition.nbInputs; ++i)
    {
        schema::Tensor const& tensor = i < definition.nbInputs ? definition.inputs[i] : definition.output;
        DynamicPluginTensorDesc desc{};
        Dims& shape = desc.max;
        for (shape.nbDims = 0; shape.nbDims < tensor.rank; ++shape.nbDims)
        {
            auto const [factor, dim] = tensor.shape[shape.nbDims];
            shape.d[shape.nbDims] = factor * (dim == schema::kSequence ? sequence : kSizes[dim]);
        }
        desc.desc.dims = desc.min = desc.opt = desc.max;
        // As TensorRT has it: the network does not know the rows, the profile does.
        if (tensor.rank > 1 && tensor.shape[1].dim == schema::kSequence)
        {
            desc.desc.dims.d[1] = -1;
        }
        desc.desc.type = tensor.kind == schema::Kind::kBool ? DataType::kBOOL
            : tensor.kind == schema::Kind::kInt8            ? DataType::kINT8
            : tensor.kind == schema::Kind::kFloat32         ? DataType::kFLOAT
                                                            : type;
        desc.desc.format = TensorFormat::kLINEAR;
        result.push_back(desc);
    }
    return result;
}

/// Which tensors may have the types and formats that they have.
std::string supported(IPluginV3OneBuild& build, std::vector<DynamicPluginTensorDesc> const& descs)
{
    auto const nbInputs = static_cast<std::int32_t>(descs.size()) - 1;
    std::string result;
    for (std::int32_t i = 0; i <= nbInputs; ++i)
    {
        result += build.supportsFormatCombination(i, descs.data(), nbInputs, 1) ? 'y' : 'n';
    }
    return result;
}

void printFormats(std::string const& op, IPluginV3OneBuild& build)
{
    std::pair<char const*, DataType> const types[]{{"bfloat16", DataType::kBF16}, {"float16", DataType::kHALF},
        {"float32", DataType::kFLOAT}, {"int8", DataType::kINT8}};
    for (auto const& [name, type] : types)
    {
        auto descs = tensors(op, 5, type);
        std::string const asT = supported(build, descs);
        for (auto& desc : descs)
        {
            desc.desc.type = type;
        }
        std::string const everywhere = supported(build, descs);
        descs = tensors(op, 5, type);
        for (auto& desc : descs)
        {
            desc.desc.format = TensorFormat::kHWC8;
        }
        std::string const other = supported(build, descs);
        std::printf("%s formats %s: %s %s %s\n", op.c_str(), name, asT.c_str(), everywhere.c_str(), other.c_str());
    }
}

void printRun(std::string const& op, IPluginV3OneRuntime& runtime)
{
    std::vector<PluginTensorDesc> descs;
    for (auto const& tensor : tensors(op, 5, DataType::kBF16))
    {
        descs.push_back(tensor.desc);
        descs.back().dims = tensor.max;
    }
    auto const nbInputs = descs.size() - 1;
    auto const shapeChange = [&] {
        return runtime.onShapeChange(descs.data(), static_cast<std::int32_t>(nbInputs), &descs[nbInputs], 1);
    };
    std::printf("%s shape change: %d\n", op.c_str(), shapeChange());
    // Null pointers, which the kernels' launcher refuses, so that nothing runs even where there is a GPU.
    std::vector<void const*> const inputs(nbInputs, nullptr);
    void* outputs[]{nullptr};
    auto const enqueue = [&] {
        return runtime.enqueue(descs.data(), &descs[nbInputs], inputs.data(), outputs, nullptr, nullptr);
    };
    std::printf("%s enqueue: %d\n", op.c_str(), enqueue());
    descs[0].dims.d[1] = descs[1].dims.d[1] = descs[nbInputs].dims.d[1] = 0;
    std::printf("%s enqueue no rows: %d\n", op.c_str(), enqueue());
    descs[1].dims.d[1] = 6;
    std::printf("%s other mask: %d\n", op.c_str(), shapeChange());
}

void printPlugin(IPluginCreatorV3One& creator)
{
    std::string const op{creator.getPluginName()};
    PluginFieldCollection fields{};
    std::unique_ptr<IPluginV3> const original{creator.createPlugin("a/node", &fields, TensorRTPhase::kRUNTIME)};
    auto* const attaching
        = static_cast<IPluginV3OneRuntime*>(original->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> const attached{attaching->attachToContext(nullptr)};
    std::unique_ptr<IPluginV3> const plugin{attached->clone()};
    auto* const core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* const runtime
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::printf(
        "%s is: %s %s %s\n", op.c_str(), core->getPluginName(), core->getPluginVersion(), core->getPluginNamespace());
    std::printf("%s serializes: %d\n", op.c_str(), runtime->getFieldsToSerialize()->nbFields);

    printFormats(op, *build);
    std::size_t last{0};
    for (std::int64_t const sequence : {1, 40, 4096})
    {
        auto descs = tensors(op, sequence, DataType::kBF16);
        auto const nbInputs = static_cast<std::int32_t>(descs.size()) - 1;
        std::printf("%s configure %ld: %d\n", op.c_str(), static_cast<long>(sequence),
            build->configurePlugin(descs.data(), nbInputs, &descs.back(), 1));
        std::size_t const size = build->getWorkspaceSize(descs.data(), nbInputs, &descs.back(), 1);
        std::printf("%s workspace %ld: %s\n", op.c_str(), static_cast<long>(sequence), size > last ? "more" : "less");
        last = size;
    }
    auto descs = tensors(op, 40, DataType::kBF16);
    descs.back().desc.type = DataType::kHALF;
    std::printf("%s other output: %d\n", op.c_str(),
        build->configurePlugin(descs.data(), static_cast<std::int32_t>(descs.size()) - 1, &descs.back(), 1));
    printRun(op, *runtime);
}

} // namespace

int main()
{
    std::int32_t count{0};
    IPluginCreatorInterface* const* const creators = getCreators(count);
    setLoggerFinder(&gFinder);
    for (std::int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        printPlugin(*creator);
        std::int32_t const value{3};
        PluginField const field{"top_k", &value, PluginFieldType::kINT32, 1};
        PluginFieldCollection const fields{1, &field};
        std::unique_ptr<IPluginV3> const refused{creator->createPlugin("b", &fields, TensorRTPhase::kRUNTIME)};
        std::unique_ptr<IPluginV3> const unnamed{creator->createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME)};
        std::printf("%s refused: %d, unnamed: %d\n", creator->getPluginName(), !refused, !!unnamed);
    }
    return 0;
}
