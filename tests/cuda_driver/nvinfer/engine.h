// An engine and its execution contexts. What is enqueued is computed by whoever registered with `nvinferOnEnqueue`.

#pragma once

#include "defaults.h"
#include "log.h"
#include "plan.h"

#include <map>
#include <string>

namespace fake
{

class Context;

/// Has what a context was enqueued for computed, in the order of a stream; returns whether somebody does that.
bool compute(Context& context, cudaStream_t stream);

class Engine final : public DefaultVCudaEngine, public nvinfer1::ICudaEngine
{
public:
    Engine(nvinfer1::ILogger* logger, Plan plan);
    ~Engine() override;

    nvinfer1::ICudaEngine* getPImpl() noexcept override
    {
        return this;
    }
    std::int32_t getNbIOTensors() const noexcept override
    {
        return static_cast<std::int32_t>(plan.tensors.size());
    }
    char const* getIOTensorName(std::int32_t index) const noexcept override
    {
        return plan.tensors.at(index).name.c_str();
    }
    std::int32_t getNbOptimizationProfiles() const noexcept override
    {
        return plan.nbProfiles;
    }
    std::int64_t getDeviceMemorySizeV2() const noexcept override
    {
        return plan.scratch;
    }
    nvinfer1::Dims getTensorShape(char const* name) const noexcept override;
    nvinfer1::DataType getTensorDataType(char const* name) const noexcept override;
    nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override;
    nvinfer1::TensorLocation getTensorLocation(char const*) const noexcept override
    {
        return nvinfer1::TensorLocation::kDEVICE;
    }
    nvinfer1::Dims getProfileShape(
        char const* name, std::int32_t profile, nvinfer1::OptProfileSelector which) const noexcept override;
    nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override;
    nvinfer1::IExecutionContext* createExecutionContext(
        nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override;
    nvinfer1::IExecutionContext* createExecutionContextWithRuntimeConfig(
        nvinfer1::IRuntimeConfig* config) noexcept override;

    Plan const plan;
    nvinfer1::ILogger* const logger;
    /// Contexts and configurations that it made and that are there still.
    int nbMade{0};
};

class RuntimeConfig final : public DefaultVRuntimeConfig, public nvinfer1::IRuntimeConfig
{
public:
    explicit RuntimeConfig(Engine& engine);
    ~RuntimeConfig() override;

    nvinfer1::IRuntimeConfig* getPImpl() noexcept override
    {
        return this;
    }
    void setExecutionContextAllocationStrategy(
        nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override
    {
        mStrategy = strategy;
    }
    nvinfer1::ExecutionContextAllocationStrategy getExecutionContextAllocationStrategy() const noexcept override
    {
        return mStrategy;
    }

private:
    Engine& mEngine;
    nvinfer1::ExecutionContextAllocationStrategy mStrategy{};
};

class Context final : public DefaultVExecutionContext, public nvinfer1::IExecutionContext
{
public:
    Context(Engine& engine, bool ownsMemory);
    ~Context() override;

    nvinfer1::IExecutionContext* getPImpl() noexcept override
    {
        return this;
    }
    std::int32_t getOptimizationProfile() const noexcept override
    {
        return profile;
    }
    bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept override;
    bool setInputShape(char const* name, nvinfer1::Dims const& shape) noexcept override;
    bool setTensorAddress(char const* name, void* address) noexcept override;
    void setDeviceMemoryV2(void* address, std::int64_t size) noexcept override;
    bool enqueueV3(cudaStream_t stream) noexcept override;

    Engine& engine;
    std::int32_t profile{0};
    void* scratch{nullptr};
    std::int64_t scratchSize{0};
    std::map<std::string, nvinfer1::Dims> shapes;
    std::map<std::string, void*> addresses;

private:
    /// Logs what a call was refused for; returns false, as the call does.
    bool refuse(std::string const& call, std::string const& reason);

    bool const mOwnsMemory;
};

} // namespace fake
