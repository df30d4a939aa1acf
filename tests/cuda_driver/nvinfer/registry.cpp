#include "registry.h"

#include "log.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <string>

using namespace nvinfer1;

namespace fake
{

namespace
{

using GetCreators = IPluginCreatorInterface* const* (*) (std::int32_t&);
using SetLoggerFinder = void (*)(ILoggerFinder*);

class Finder final : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return globalLogger();
    }
} gFinder;

IPluginRegistry::PluginLibraryHandle refuse(std::string const& reason)
{
    say(globalLogger(), "IPluginRegistry::loadLibrary: Error Code 3: API Usage Error (" + reason + ")");
    return nullptr;
}

} // namespace

IPluginCreatorInterface* Registry::find(char const* name, char const* version, char const* space) const
{
    auto const found = std::find_if(mCreators.begin(), mCreators.end(), [&](IPluginCreatorInterface* creator) {
        auto* const known = static_cast<IPluginCreatorV3One*>(creator);
        return !std::strcmp(known->getPluginName(), name) && !std::strcmp(known->getPluginVersion(), version)
            && !std::strcmp(known->getPluginNamespace(), space);
    });
    return found == mCreators.end() ? nullptr : *found;
}

IPluginRegistry::PluginLibraryHandle Registry::loadLibrary(char const* path) noexcept
{
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
    {
        return refuse(dlerror());
    }
    auto const getCreators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    if (getCreators == nullptr)
    {
        dlclose(handle);
        return refuse(std::string{path} + " has no getCreators");
    }
    if (auto const set = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder")))
    {
        set(&gFinder);
    }
    std::int32_t count{0};
    IPluginCreatorInterface* const* const creators = getCreators(count);
    for (std::int32_t i = 0; i < count; ++i)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (find(creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace()) != nullptr)
        {
            return refuse(std::string{creator->getPluginName()} + " is registered already");
        }
    }
    mCreators.insert(mCreators.end(), creators, creators + count);
    return handle;
}

void Registry::deregisterLibrary(PluginLibraryHandle handle) noexcept
{
    auto const getCreators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    std::int32_t count{0};
    IPluginCreatorInterface* const* const creators = getCreators(count);
    mCreators.erase(std::remove_if(mCreators.begin(), mCreators.end(),
                        [&](IPluginCreatorInterface* creator) {
                            return std::find(creators, creators + count, creator) != creators + count;
                        }),
        mCreators.end());
    dlclose(handle);
}

IPluginCreatorInterface* Registry::getCreator(char const* name, char const* version, char const* space) noexcept
{
    IPluginCreatorInterface* const found = find(name, version, space);
    if (found == nullptr)
    {
        // As TensorRT does: whoever only asks is told of an error.
        say(globalLogger(),
            std::string{"IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: "} + name
                + ", version: " + version + ", namespace:" + space + ".)");
    }
    return found;
}

IPluginCreatorInterface* const* Registry::getAllCreators(std::int32_t* count) const noexcept
{
    *count = static_cast<std::int32_t>(mCreators.size());
    return mCreators.data();
}

} // namespace fake
