// A node of the operator family inside TensorRT: translate and check, nothing more.

#pragma once

#include "schema.h"

#include <NvInferRuntime.h>

#include <string>

namespace monoedge::trt
{

class ExpertPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime
{
public:
    /// `node` is the name by which messages call it.
    ExpertPlugin(schema::Operator const& definition, std::string node);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    std::int32_t getNbOutputs() const noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, std::int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, std::int32_t nbInputs) const noexcept override;
    std::int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, std::int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, std::int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
        std::int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(std::int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
        std::int32_t nbInputs, std::int32_t nbOutputs) noexcept override;
    std::int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, std::int32_t nbOutputs) noexcept override;
    std::size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, std::int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, std::int32_t nbOutputs) const noexcept override;

    // IPluginV3OneRuntime
    std::int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, std::int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, std::int32_t nbOutputs) noexcept override;
    std::int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    schema::Operator const& definition() const
    {
        return *mDefinition;
    }

    schema::Operator const* mDefinition;
    std::string mNode;
    nvinfer1::PluginFieldCollection mNoFields{}; ///< Sizes and types come with every call; there is nothing to keep.
};

} // namespace monoedge::trt
