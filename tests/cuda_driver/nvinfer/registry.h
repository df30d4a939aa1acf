// The registry of plugins of this process.

#pragma once

#include "defaults.h"

#include <vector>

namespace fake
{

class Registry final : public DefaultIPluginRegistry
{
public:
    PluginLibraryHandle loadLibrary(char const* path) noexcept override;
    void deregisterLibrary(PluginLibraryHandle handle) noexcept override;
    nvinfer1::IPluginCreatorInterface* getCreator(
        char const* name, char const* version, char const* space) noexcept override;
    nvinfer1::IPluginCreatorInterface* const* getAllCreators(std::int32_t* count) const noexcept override;
    nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(std::int32_t* count) noexcept override
    {
        return getAllCreators(count);
    }

    /// Empties it, as that of a new process is.
    void forget()
    {
        mCreators.clear();
    }

private:
    nvinfer1::IPluginCreatorInterface* find(char const* name, char const* version, char const* space) const;

    std::vector<nvinfer1::IPluginCreatorInterface*> mCreators;
};

} // namespace fake
