#include "creator.h"

#include "exports.h"
#include "plugin.h"
#include "report.h"

#include <iterator>
#include <string>
#include <vector>

namespace monoedge::trt
{

ExpertPluginCreator::ExpertPluginCreator(schema::Operator const& definition)
    : mDefinition{definition}
{
}

nvinfer1::IPluginV3* ExpertPluginCreator::createPlugin(
    char const* name, nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase) noexcept
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

nvinfer1::PluginFieldCollection const* ExpertPluginCreator::getFieldNames() noexcept
{
    return &mNoFields;
}

char const* ExpertPluginCreator::getPluginName() const noexcept
{
    return mDefinition.name;
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
    using monoedge::schema::kOperators;
    using monoedge::trt::ExpertPluginCreator;
    static std::vector<ExpertPluginCreator> creators{std::begin(kOperators), std::end(kOperators)};
    static std::vector<nvinfer1::IPluginCreatorInterface*> const pointers = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> result;
        for (ExpertPluginCreator& creator : creators)
        {
            result.push_back(&creator);
        }
        return result;
    }();
    nbCreators = static_cast<std::int32_t>(pointers.size());
    return pointers.data();
}
