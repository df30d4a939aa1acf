#include "contract.h"

#include "report.h"

namespace monoedge::trt
{

namespace
{

using nvinfer1::DataType;

std::string name(DataType type)
{
    switch (type)
    {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kBOOL: return "bool";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "TensorRT's data type " + std::to_string(static_cast<std::int32_t>(type));
    }
}

/// "text(0), text(1), …"
template <typename Text>
std::string list(std::int32_t count, Text&& text)
{
    std::string result;
    for (std::int32_t i = 0; i < count; ++i)
    {
        result += (i == 0 ? "" : ", ") + text(i);
    }
    return result;
}

std::string text(nvinfer1::Dims const& shape)
{
    auto const size = [&](std::int32_t i) { return shape.d[i] < 0 ? "?" : std::to_string(shape.d[i]); };
    return "[" + list(shape.nbDims, size) + "]";
}

std::string symbol(schema::Extent extent)
{
    return (extent.factor == 1 ? "" : std::to_string(extent.factor) + "*") + schema::kDimNames[extent.dim];
}

std::string symbols(schema::Tensor const& tensor)
{
    return "[" + list(tensor.rank, [&](std::int32_t i) { return symbol(tensor.shape[i]); }) + "]";
}

/// The type that a tensor has in every node; kT has no such type.
DataType fixedType(schema::Kind kind)
{
    switch (kind)
    {
    case schema::Kind::kBool: return DataType::kBOOL;
    case schema::Kind::kInt8: return DataType::kINT8;
    default: return DataType::kFLOAT;
    }
}

bool typeFits(schema::Tensor const& tensor, DataType type, DataType nodeType) noexcept
{
    bool const isFloat = nodeType == DataType::kHALF || nodeType == DataType::kBF16;
    return tensor.kind == schema::Kind::kT ? type == nodeType && isFloat : type == fixedType(tensor.kind);
}

} // namespace

void checkCounts(schema::Operator const& op, std::int32_t nbInputs, std::int32_t nbOutputs)
{
    if (nbInputs == op.nbInputs && nbOutputs == 1)
    {
        return;
    }
    std::string const names = list(op.nbInputs, [&](std::int32_t i) { return std::string{op.inputs[i].name}; });
    throw Refusal(std::string{op.name} + " version " + schema::kVersion + " must have " + std::to_string(op.nbInputs)
        + " inputs (" + names + ") and 1 output, got " + std::to_string(nbInputs) + " and " + std::to_string(nbOutputs)
        + "; export the model with the monoedge that this plugin comes with");
}

void checkType(schema::Tensor const& tensor, DataType type, DataType nodeType)
{
    if (typeFits(tensor, type, nodeType))
    {
        return;
    }
    std::string const got = ", got " + name(type);
    if (tensor.kind != schema::Kind::kT)
    {
        throw Refusal(std::string{tensor.name} + " must be " + name(fixedType(tensor.kind)) + got);
    }
    if (type == nodeType)
    {
        throw Refusal(
            std::string{tensor.name} + " must be bfloat16 or float16" + got + "; export the model with --dtype bf16");
    }
    throw Refusal(std::string{tensor.name} + " must be " + name(nodeType) + " like the node's first input" + got);
}

bool formatFits(
    schema::Tensor const& tensor, nvinfer1::PluginTensorDesc const& desc, DataType nodeType) noexcept
{
    return desc.format == nvinfer1::TensorFormat::kLINEAR && typeFits(tensor, desc.type, nodeType);
}

void checkFormat(schema::Tensor const& tensor, nvinfer1::PluginTensorDesc const& desc, DataType nodeType)
{
    checkType(tensor, desc.type, nodeType);
    if (!formatFits(tensor, desc, nodeType))
    {
        throw Refusal(std::string{tensor.name} + " must be in the linear layout, got TensorRT's format "
            + std::to_string(static_cast<std::int32_t>(desc.format)));
    }
}

void Sizes::bind(schema::Tensor const& tensor, nvinfer1::Dims const& shape)
{
    if (shape.nbDims != tensor.rank)
    {
        throw Refusal(std::string{tensor.name} + " must have " + std::to_string(tensor.rank) + " dimensions, "
            + symbols(tensor) + ", got " + text(shape));
    }
    for (std::int32_t i = 0; i < tensor.rank; ++i)
    {
        auto const [factor, dim] = tensor.shape[i];
        std::int64_t const got = shape.d[i];
        bool const fits = mSizes[dim] == kUnknown ? got % factor == 0 : got == factor * mSizes[dim];
        if (got >= 0 && !fits)
        {
            throw Refusal(
                std::string{tensor.name} + " must be " + symbols(tensor) + expected(tensor) + ", got " + text(shape));
        }
    }
    for (std::int32_t i = 0; i < tensor.rank; ++i)
    {
        auto const [factor, dim] = tensor.shape[i];
        mSizes[dim] = shape.d[i] < 0 ? mSizes[dim] : shape.d[i] / factor;
    }
}

void Sizes::requireAll(schema::Operator const& op) const
{
    for (std::int32_t i = 0; i <= op.nbInputs; ++i)
    {
        schema::Tensor const& tensor = op.tensor(i);
        for (std::int32_t j = 0; j < tensor.rank; ++j)
        {
            if (mSizes[tensor.shape[j].dim] == kUnknown)
            {
                throw Refusal(std::string{tensor.name} + " must have a known shape, " + symbols(tensor) + ", got one"
                    + " without " + schema::kDimNames[tensor.shape[j].dim]);
            }
        }
    }
}

std::string Sizes::expected(schema::Tensor const& tensor) const
{
    auto const size = [&](std::int32_t i) {
        auto const [factor, dim] = tensor.shape[i];
        return mSizes[dim] == kUnknown ? symbol(tensor.shape[i]) : std::to_string(factor * mSizes[dim]);
    };
    std::string const numbers = "[" + list(tensor.rank, size) + "]";
    return numbers == symbols(tensor) ? "" : " = " + numbers;
}

std::string Sizes::describe() const
{
    std::string result;
    for (std::int32_t dim = 0; dim < schema::kDims; ++dim)
    {
        if (mSizes[dim] != kUnknown)
        {
            result += (result.empty() ? "" : ", ") + std::string{schema::kDimNames[dim]} + " "
                + std::to_string(mSizes[dim]);
        }
    }
    return result;
}

} // namespace monoedge::trt
