#include "creator.h"

#include "exports.h"
#include "plugin.h"
#include "report.h"

#include <iterator>
#include <string>

namespace monoedge::trt
{

ExpertPluginCreator::ExpertPluginCreator(Operation const& operation)
    : mOperation{operation}
{
}

nvinfer1::IPluginV3* ExpertPluginCreator::createPlugin(
    char const* name, nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase) noexcept
{
    nvinfer1::IPluginV3* plugin{nullptr};
    auto const make = [&] {
        if (fc != nullptr && fc->nbFields != 0)
        {
            throw Refusal(std::string{mOperation.definition.name} + " version " + schema::kVersion
                + " takes no fields, got " + fc->fields[0].name + "; use the plugin that the plan was built with");
        }
        bool const named = name != nullptr && *name != '\0';
        plugin = new ExpertPlugin(mOperation, named ? name : mOperation.definition.name);
    };
    guarded(name == nullptr ? "" : name, make);
    return plugin;
}

nvinfer1::PluginFieldCollection const* ExpertPluginCreator::getFieldNames() noexcept
{
    return &mNoFields;
}

char const* ExpertPluginCreator::getPluginName() const noexcept
{
    return mOperation.definition.name;
}

char const* ExpertPluginCreator::getPluginVersion() const noexcept
{
    return schema::kVersion;
}

char const* ExpertPluginCreator::getPluginNamespace() const noexcept
{
    return schema::kNamespace;
}

} // namespace monoedge::trt

nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& nbCreators)
{
    using monoedge::trt::ExpertPluginCreator;
    using monoedge::trt::gOperations;
    static ExpertPluginCreator fusedMoe{gOperations[0]};
    static ExpertPluginCreator expertLinear{gOperations[1]};
    static nvinfer1::IPluginCreatorInterface* const creators[]{&fusedMoe, &expertLinear};
    static_assert(std::size(creators) == monoedge::trt::kOperations);
    nbCreators = monoedge::trt::kOperations;
    return creators;
}
