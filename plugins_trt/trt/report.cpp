#include "report.h"

#include "exports.h"

#include <atomic>
#include <cstdio>
#include <cstring>

namespace monoedge::trt
{

namespace
{

constexpr std::size_t kMaxLine{1024};
constexpr std::size_t kMaxName{200}; ///< Leaves room for what is said of a node.

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

// TensorRT 11 changed the layout of loggers and of their finder. A library compiled with headers of 10 gets null from
// the finder (seen with TensorRT for RTX 1.7.1), and its lines go to standard error. This is one reason why the build
// takes a device's own headers first.
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

/// Bytes of a name that a line shows. What is cut off are whole characters of UTF-8: loggers in Python take no halves.
int lengthOfName(char const* name) noexcept
{
    std::size_t length = std::strlen(name);
    if (length > kMaxName)
    {
        for (length = kMaxName; length > 0 && (name[length] & 0xC0) == 0x80; --length)
        {
        }
    }
    return static_cast<int>(length);
}

} // namespace

void report(nvinfer1::ILogger::Severity severity, char const* node, char const* message) noexcept
{
    // On the stack, since the report may be that memory ran out.
    char line[kMaxLine];
    std::snprintf(line, sizeof(line), "[monoedge] %.*s: %s", lengthOfName(node), node, message);
    if (nvinfer1::ILogger* const found = logger())
    {
        found->log(severity, line);
    }
    else if (severity <= nvinfer1::ILogger::Severity::kWARNING)
    {
        std::fprintf(stderr, "%s\n", line);
    }
}

void warnOnce(char const* node, char const* message) noexcept
{
    static std::atomic_flag isSaid = ATOMIC_FLAG_INIT;
    if (!isSaid.test_and_set())
    {
        report(nvinfer1::ILogger::Severity::kWARNING, node, message);
    }
}

} // namespace monoedge::trt

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    monoedge::trt::gLoggerFinder = finder;
}
