// Errors are reported through TensorRT's logger, with the node's name. Nothing is thrown into TensorRT.

#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace monoedge::trt
{

/// Why a node cannot be built or run: one line with what was expected and what came.
class Refusal : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

/// Reports a line about a node, on standard error where TensorRT has given no logger.
void report(nvinfer1::ILogger::Severity severity, char const* node, char const* message) noexcept;

/// Reports a warning about a node, the first time in this process that there is one.
void warnOnce(char const* node, char const* message) noexcept;

/// Runs a body and returns 0, or reports what the body threw and returns -1.
template <typename Body>
std::int32_t guarded(std::string const& node, Body&& body) noexcept
{
    using Severity = nvinfer1::ILogger::Severity;
    try
    {
        body();
        return 0;
    }
    catch (std::exception const& error)
    {
        report(Severity::kERROR, node.c_str(), error.what());
    }
    catch (...)
    {
        report(Severity::kERROR, node.c_str(), "an unknown exception");
    }
    return -1;
}

} // namespace monoedge::trt
