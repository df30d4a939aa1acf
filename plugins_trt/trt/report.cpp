#include "report.h"

#include "exports.h"

#include <atomic>
#include <cstdio>

namespace monoedge::trt
{

namespace
{

constexpr std::size_t kMaxLine{1024};

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

// TensorRT 11 laid out loggers and their finder anew. A library compiled with headers of 10 gets null from its finder
// (seen with TensorRT for RTX 1.7.1), so that lines go to standard error; a device's own headers come first in the
// build for this reason too.
nvinfer1::ILogger* logger() noexcept
{
    nvinfer1::ILoggerFinder* const finder = gLoggerFinder;
    try
    {
        return finder == nullptr ? nullptr : finder->findLogger();
    }
    catch (...)
    {
        return nullptr;
    }
}

} // namespace

void report(nvinfer1::ILogger::Severity severity, char const* node, char const* message) noexcept
{
    // On the stack: this may be about memory that ran out.
    char line[kMaxLine];
    std::snprintf(line, sizeof(line), "[monoedge] %s: %s", node, message);
    if (nvinfer1::ILogger* const found = logger())
    {
        found->log(severity, line);
    }
    else if (severity <= nvinfer1::ILogger::Severity::kWARNING)
    {
        std::fprintf(stderr, "%s\n", line);
    }
}

} // namespace monoedge::trt

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    monoedge::trt::gLoggerFinder = finder;
}
