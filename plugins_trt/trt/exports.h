// The two functions that TensorRT looks up in a plugin library when it loads one. All else is hidden, but for the
// entries of core/preprocess.h and core/experts.h.

#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

#if NV_TENSORRT_MAJOR < 10
#error "monoedge's plugin needs the headers of TensorRT 10 or later (IPluginV3)"
#endif

#define MONOEDGE_EXPORT __attribute__((visibility("default")))

extern "C"
{
    MONOEDGE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
    MONOEDGE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& nbCreators);
}
