// A plugin library that has one plugin, named by PLUGIN: it can be found, and makes nothing.

#include <NvInferRuntime.h>

using namespace nvinfer1;

namespace
{

class Creator final : public IPluginCreatorV3One
{
public:
    IPluginV3* createPlugin(char const*, PluginFieldCollection const*, TensorRTPhase) noexcept override
    {
        return nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mFields;
    }
    char const* getPluginName() const noexcept override
    {
        return PLUGIN;
    }
    char const* getPluginVersion() const noexcept override
    {
        return "1";
    }
    char const* getPluginNamespace() const noexcept override
    {
        return "monoedge";
    }

private:
    PluginFieldCollection const mFields{};
} gCreator;

} // namespace

extern "C" IPluginCreatorInterface* const* getCreators(std::int32_t& count)
{
    static IPluginCreatorInterface* const creators[]{&gCreator};
    count = 1;
    return creators;
}
