#include "log.h"

#include <atomic>
#include <mutex>

using namespace nvinfer1;

namespace fake
{

namespace
{

std::mutex gMutex;
ILogger* gLogger{nullptr};
int gRetained{0};
std::atomic<int> gLive{0};
std::string gComplaints;

} // namespace

void say(ILogger* logger, std::string const& message)
{
    if (logger != nullptr)
    {
        logger->log(ILogger::Severity::kERROR, message.c_str());
    }
}

ILogger* globalLogger()
{
    std::lock_guard<std::mutex> const lock{gMutex};
    return gLogger;
}

void retainLogger(ILogger* logger)
{
    bool differs{false};
    {
        std::lock_guard<std::mutex> const lock{gMutex};
        gLogger = gRetained == 0 ? logger : gLogger;
        ++gRetained;
        differs = gLogger != logger;
    }
    if (differs)
    {
        logger->log(ILogger::Severity::kWARNING,
            "The logger passed into createInferRuntime differs from one already registered for an existing builder, "
            "runtime, or refitter.");
    }
}

void releaseLogger()
{
    std::lock_guard<std::mutex> const lock{gMutex};
    gLogger = --gRetained == 0 ? nullptr : gLogger;
}

void countLive(int change)
{
    gLive += change;
}

void complain(std::string const& message)
{
    std::lock_guard<std::mutex> const lock{gMutex};
    gComplaints += message + "\n";
}

} // namespace fake

extern "C" int nvinferLive()
{
    return fake::gLive;
}

extern "C" char const* nvinferComplaints()
{
    return fake::gComplaints.c_str();
}
