#include "exports.h"
#include "plugin.h"
#include "report.h"

#include <iterator>
#include <string>
#include <vector>

namespace monoedge::trt
{

namespace
{

/// Makes plugins of one operator, for TensorRT's ONNX parser and for plans that hold one.
class ExpertPluginCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit ExpertPluginCreator(schema::Operator const& definition)
        : mDefinition{definition}
    {
    }

    nvinfer1::IPluginV3* createPlugin(
        char const* name, nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase) noexcept override
    {
        nvinfer1::IPluginV3* plugin{nullptr};
        auto const make = [&] {
            if (fc != nullptr && fc->nbFields != 0)
            {
                throw Refusal(std::string{mDefinition.name} + " version " + schema::kVersion
                    + " takes no fields, got " + fc->fields[0].name + "; use the plugin that the plan was built with");
            }
            bool const named = name != nullptr && *name != '\0';
            plugin = makePlugin(mDefinition, named ? name : mDefinition.name);
        };
        guarded(name == nullptr ? "" : name, make);
        return plugin;
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mNoFields;
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

private:
    schema::Operator const& mDefinition;
    nvinfer1::PluginFieldCollection mNoFields{}; ///< The operators have no attributes of their own.
};

} // namespace

} // namespace monoedge::trt

nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& nbCreators)
{
    using monoedge::schema::kOperators;
    static std::vector<monoedge::trt::ExpertPluginCreator> creators{std::begin(kOperators), std::end(kOperators)};
    static std::vector<nvinfer1::IPluginCreatorInterface*> const pointers = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> result;
        for (auto& creator : creators)
        {
            result.push_back(&creator);
        }
        return result;
    }();
    nbCreators = static_cast<std::int32_t>(pointers.size());
    return pointers.data();
}
