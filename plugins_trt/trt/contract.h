// Checks a node's tensors against the operator's definition: how many, of which types, ranks and shapes.

#pragma once

#include "schema.h"

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>

namespace monoedge::trt
{

/// The size of a dimension that is not known while the network is being built; TensorRT's own number for it.
inline constexpr std::int64_t kUnknown{-1};

/// Throws a Refusal unless a node has as many inputs and outputs as its operator.
void checkCounts(schema::Operator const& op, std::int32_t nbInputs, std::int32_t nbOutputs);

/// Throws a Refusal unless `type` is what `tensor` may be; `nodeType` is the type of the node's first input.
void checkType(schema::Tensor const& tensor, nvinfer1::DataType type, nvinfer1::DataType nodeType);

/// Throws a Refusal unless `tensor` has the type and the layout that it must have.
void checkFormat(schema::Tensor const& tensor, nvinfer1::PluginTensorDesc const& desc, nvinfer1::DataType nodeType);

/// Whether `tensor` has the type and the layout that it must have.
bool formatFits(
    schema::Tensor const& tensor, nvinfer1::PluginTensorDesc const& desc, nvinfer1::DataType nodeType) noexcept;

/// The numbers that a node's named dimensions have.
class Sizes
{
public:
    Sizes()
    {
        mSizes.fill(kUnknown);
    }

    /// Takes the numbers from a tensor's shape. Throws a Refusal where they contradict the definition or each other.
    void bind(schema::Tensor const& tensor, nvinfer1::Dims const& shape);

    std::int64_t operator[](schema::Dim dim) const
    {
        return mSizes[dim];
    }

    /// Throws a Refusal if a size of a node's tensors is not known.
    void requireAll(schema::Operator const& op) const;

    /// batch · sequence
    std::int64_t rows() const
    {
        return mSizes[schema::kBatch] * mSizes[schema::kSequence];
    }

    /// "batch 1, sequence 5, in 64", without those that are unknown.
    std::string describe() const;

private:
    std::string expected(schema::Tensor const& tensor) const;

    std::array<std::int64_t, schema::kDims> mSizes;
};

/// Binds the first `count` tensors of an operator, its output being the last; `dims(i)` is the shape of the i-th.
template <typename Shape>
Sizes bindAll(schema::Operator const& op, std::int32_t count, Shape&& dims)
{
    Sizes sizes;
    for (std::int32_t i = 0; i < count; ++i)
    {
        sizes.bind(op.tensor(i), dims(i));
    }
    return sizes;
}

/// Checks the types and layouts of all tensors of an operator; `desc(i)` describes the i-th.
template <typename Describe>
void checkFormats(schema::Operator const& op, Describe&& desc)
{
    for (std::int32_t i = 0; i <= op.nbInputs; ++i)
    {
        checkFormat(op.tensor(i), desc(i), desc(0).type);
    }
}

} // namespace monoedge::trt
