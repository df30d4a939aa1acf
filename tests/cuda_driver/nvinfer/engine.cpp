#include "engine.h"

using namespace nvinfer1;

namespace fake
{

namespace
{

/// Addresses that TensorRT takes begin at a multiple of this.
constexpr std::uintptr_t kALIGNMENT{256};

} // namespace

Engine::Engine(ILogger* logger_, Plan plan_)
    : plan{std::move(plan_)}
    , logger{logger_}
{
    DefaultVCudaEngine* const self{this};
    mImpl = self;
    countLive(1);
}

Engine::~Engine()
{
    if (nbMade > 0)
    {
        complain("an engine is gone before what it made");
    }
    countLive(-1);
}

Dims Engine::getTensorShape(char const* name) const noexcept
{
    Tensor const* const tensor = plan.find(name);
    return tensor == nullptr ? Dims{-1, {}} : tensor->shape;
}

DataType Engine::getTensorDataType(char const* name) const noexcept
{
    Tensor const* const tensor = plan.find(name);
    return tensor == nullptr ? DataType::kFLOAT : tensor->type;
}

TensorIOMode Engine::getTensorIOMode(char const* name) const noexcept
{
    Tensor const* const tensor = plan.find(name);
    return tensor == nullptr ? TensorIOMode::kNONE : tensor->isInput ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}

Dims Engine::getProfileShape(char const* name, std::int32_t profile, OptProfileSelector which) const noexcept
{
    Tensor const* const tensor = plan.find(name);
    return tensor == nullptr || !tensor->isInput || profile >= plan.nbProfiles ? Dims{-1, {}}
                                                                               : tensor->range(profile, which);
}

IRuntimeConfig* Engine::createRuntimeConfig() noexcept
{
    return new RuntimeConfig{*this};
}

IExecutionContext* Engine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept
{
    if (plan.fails == "context")
    {
        say(logger, "ICudaEngine::createExecutionContext: Error Code 2: OutOfMemory (no memory for this plan)");
        return nullptr;
    }
    return new Context{*this, strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED};
}

IExecutionContext* Engine::createExecutionContextWithRuntimeConfig(IRuntimeConfig* config) noexcept
{
    return createExecutionContext(config->getExecutionContextAllocationStrategy());
}

RuntimeConfig::RuntimeConfig(Engine& engine)
    : mEngine{engine}
{
    DefaultVRuntimeConfig* const self{this};
    mImpl = self;
    ++mEngine.nbMade;
    countLive(1);
}

RuntimeConfig::~RuntimeConfig()
{
    --mEngine.nbMade;
    countLive(-1);
}

Context::Context(Engine& engine_, bool ownsMemory)
    : engine{engine_}
    , mOwnsMemory{ownsMemory}
{
    DefaultVExecutionContext* const self{this};
    mImpl = self;
    ++engine.nbMade;
    countLive(1);
}

Context::~Context()
{
    --engine.nbMade;
    countLive(-1);
}

bool Context::refuse(std::string const& call, std::string const& reason)
{
    say(engine.logger, "IExecutionContext::" + call + ": Error Code 3: API Usage Error (" + reason + ")");
    return false;
}

bool Context::setOptimizationProfileAsync(std::int32_t index, cudaStream_t) noexcept
{
    if (index < 0 || index >= engine.plan.nbProfiles)
    {
        return refuse("setOptimizationProfileAsync", "there is no profile " + std::to_string(index));
    }
    profile = index;
    shapes.clear();
    return true;
}

bool Context::setInputShape(char const* name, Dims const& shape) noexcept
{
    Tensor const* const tensor = engine.plan.find(name);
    if (tensor == nullptr || !tensor->isInput)
    {
        return refuse("setInputShape", std::string{"there is no input "} + name);
    }
    Dims const& least = tensor->range(profile, OptProfileSelector::kMIN);
    Dims const& greatest = tensor->range(profile, OptProfileSelector::kMAX);
    bool fits = shape.nbDims == least.nbDims;
    for (std::int32_t i = 0; fits && i < shape.nbDims; ++i)
    {
        fits = least.d[i] <= shape.d[i] && shape.d[i] <= greatest.d[i];
    }
    if (!fits)
    {
        return refuse("setInputShape", std::string{"the shape of "} + name + " is not within the profile");
    }
    shapes[name] = shape;
    return true;
}

bool Context::setTensorAddress(char const* name, void* address) noexcept
{
    if (engine.plan.find(name) == nullptr)
    {
        return refuse("setTensorAddress", std::string{"there is no tensor "} + name);
    }
    if (reinterpret_cast<std::uintptr_t>(address) % kALIGNMENT != 0)
    {
        return refuse("setTensorAddress", std::string{"the address of "} + name + " is not aligned");
    }
    addresses[name] = address;
    return true;
}

void Context::setDeviceMemoryV2(void* address, std::int64_t size) noexcept
{
    scratch = address;
    scratchSize = size;
}

bool Context::enqueueV3(cudaStream_t stream) noexcept
{
    if (engine.plan.fails == "enqueue")
    {
        return refuse("enqueueV3", "this plan fails");
    }
    if (!mOwnsMemory && (scratch == nullptr || scratchSize < engine.plan.scratch))
    {
        return refuse("enqueueV3", "too little memory for activations");
    }
    for (Tensor const& tensor : engine.plan.tensors)
    {
        if (addresses.count(tensor.name) == 0)
        {
            return refuse("enqueueV3", tensor.name + " has no address");
        }
        if (tensor.isInput && shapes.count(tensor.name) == 0)
        {
            return refuse("enqueueV3", tensor.name + " has no shape");
        }
    }
    return compute(*this, stream) || refuse("enqueueV3", "nobody computes");
}

} // namespace fake
