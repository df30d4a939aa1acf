// What a plan of this library says: text, word by word.
//
//   plan GRAPH scratch BYTES profiles COUNT [fails enqueue|context]
//   in NAME TYPE RANK SIZES…     then for each profile least, best and greatest shape, each RANK SIZES…
//   out NAME TYPE RANK SIZES…

#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fake
{

struct Tensor
{
    std::string name;
    bool isInput;
    nvinfer1::DataType type;
    nvinfer1::Dims shape;
    /// Least, best and greatest shape of each profile.
    std::vector<nvinfer1::Dims> ranges;

    nvinfer1::Dims const& range(std::int32_t profile, nvinfer1::OptProfileSelector which) const
    {
        return ranges.at(3 * profile + static_cast<std::int32_t>(which));
    }
};

struct Plan
{
    std::string graph;
    std::int64_t scratch{0};
    std::int32_t nbProfiles{0};
    /// What its engine refuses.
    std::string fails;
    std::vector<Tensor> tensors;

    Tensor const* find(std::string const& name) const;
};

/// Whether `text` is a plan, which is then in `plan`.
bool read(std::string const& text, Plan& plan);

} // namespace fake
