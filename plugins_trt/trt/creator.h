// Makes plugins of one operator, for TensorRT's ONNX parser and for plans that hold one.

#pragma once

#include "schema.h"

#include <NvInferRuntime.h>

namespace monoedge::trt
{

class ExpertPluginCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit ExpertPluginCreator(schema::Operator const& definition);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    schema::Operator const& mDefinition;
    nvinfer1::PluginFieldCollection mNoFields{}; ///< The operators have no attributes of their own.
};

} // namespace monoedge::trt
