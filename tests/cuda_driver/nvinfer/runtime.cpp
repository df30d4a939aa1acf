// What libnvinfer exports: TensorRT's own functions, and those that tests ask by.

#include "engine.h"
#include "registry.h"

#include <algorithm>
#include <thread>

using namespace nvinfer1;

namespace fake
{

namespace
{

using Compute = bool (*)(Context* context, cudaStream_t stream);
Compute gCompute{nullptr};

class Runtime final : public DefaultVRuntime, public IRuntime
{
public:
    explicit Runtime(ILogger* logger)
        : mLogger{logger}
    {
        DefaultVRuntime* const self{this};
        mImpl = self;
        retainLogger(logger);
        countLive(1);
    }

    ~Runtime() override
    {
        releaseLogger();
        countLive(-1);
    }

    IRuntime* getPImpl() noexcept override
    {
        return this;
    }

    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override
    {
        Plan plan;
        if (!read(std::string{static_cast<char const*>(blob), size}, plan))
        {
            // Two errors, of which the first tells more, as from TensorRT.
            say(mLogger, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Version tag does not match.)");
            say(mLogger, "IRuntime::deserializeCudaEngine: Error Code 4: Internal Error (Engine deserialization failed.)");
            return nullptr;
        }
        return new Engine{mLogger, std::move(plan)};
    }

private:
    ILogger* const mLogger;
};

Registry gRegistry;
bool gStarts{true};

} // namespace

bool compute(Context& context, cudaStream_t stream)
{
    return gCompute != nullptr && gCompute(&context, stream);
}

} // namespace fake

extern "C"
{

void* createInferRuntime_INTERNAL(void* logger, std::int32_t) noexcept
{
    if (!fake::gStarts)
    {
        fake::say(static_cast<ILogger*>(logger), "CUDA initialization failure with error: 35.");
        return nullptr;
    }
    return static_cast<IRuntime*>(new fake::Runtime{static_cast<ILogger*>(logger)});
}

IPluginRegistry* getPluginRegistry() noexcept
{
    return &fake::gRegistry;
}

void* createInferBuilder_INTERNAL(void*, std::int32_t) noexcept
{
    return nullptr;
}

void* createInferRefitter_INTERNAL(void*, void*, std::int32_t) noexcept
{
    return nullptr;
}

IPluginRegistry* getBuilderPluginRegistry(EngineCapability) noexcept
{
    return &fake::gRegistry;
}

void nvinferStarts(bool works)
{
    fake::gStarts = works;
}

void nvinferForgetPlugins()
{
    fake::gRegistry.forget();
}

/// Logs an error to the first logger, from this thread or one of its own.
void nvinferLog(char const* message, bool thread)
{
    auto const log = [message] { fake::say(fake::globalLogger(), message); };
    if (thread)
    {
        std::thread{log}.join();
    }
    else
    {
        log();
    }
}

/// Who computes what is enqueued: called with a context, for the functions below, and a stream.
void nvinferOnEnqueue(fake::Compute compute)
{
    fake::gCompute = compute;
}

char const* nvinferGraph(fake::Context* context)
{
    return context->engine.plan.graph.c_str();
}

void* nvinferScratch(fake::Context* context, std::int64_t* size)
{
    *size = context->scratchSize;
    return context->scratch;
}

void* nvinferAddress(fake::Context* context, char const* name)
{
    return context->addresses.at(name);
}

/// Writes the shape that an input was given, and returns its rank.
std::int32_t nvinferShape(fake::Context* context, char const* name, std::int64_t* sizes)
{
    Dims const& shape = context->shapes.at(name);
    std::copy_n(shape.d, shape.nbDims, sizes);
    return shape.nbDims;
}

} // extern "C"
