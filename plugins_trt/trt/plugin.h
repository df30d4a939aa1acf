// A node of the operator family inside TensorRT.

#pragma once

#include "schema.h"

#include <NvInferRuntime.h>

#include <string>

namespace monoedge::trt
{

/// Makes the plugin of one node; `node` is the name by which messages call it.
nvinfer1::IPluginV3* makePlugin(schema::Operator const& definition, std::string node);

} // namespace monoedge::trt
