#include "plan.h"

#include <sstream>

using namespace nvinfer1;

namespace fake
{

namespace
{

Dims readDims(std::istream& words)
{
    Dims dims{};
    words >> dims.nbDims;
    for (std::int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i)
    {
        words >> dims.d[i];
    }
    return dims;
}

Tensor readTensor(std::istream& words, bool isInput, std::int32_t nbProfiles)
{
    Tensor tensor{};
    std::int32_t type{0};
    words >> tensor.name >> type;
    tensor.isInput = isInput;
    tensor.type = static_cast<DataType>(type);
    tensor.shape = readDims(words);
    for (std::int32_t i = 0; isInput && i < 3 * nbProfiles; ++i)
    {
        tensor.ranges.push_back(readDims(words));
    }
    return tensor;
}

} // namespace

Tensor const* Plan::find(std::string const& name) const
{
    for (Tensor const& tensor : tensors)
    {
        if (tensor.name == name)
        {
            return &tensor;
        }
    }
    return nullptr;
}

bool read(std::string const& text, Plan& plan)
{
    std::istringstream words{text};
    std::string word;
    if (!(words >> word) || word != "plan" || !(words >> plan.graph))
    {
        return false;
    }
    while (words >> word)
    {
        if (word == "scratch")
        {
            words >> plan.scratch;
        }
        else if (word == "profiles")
        {
            words >> plan.nbProfiles;
        }
        else if (word == "fails")
        {
            words >> plan.fails;
        }
        else if (word == "in" || word == "out")
        {
            plan.tensors.push_back(readTensor(words, word == "in", plan.nbProfiles));
        }
        else
        {
            return false;
        }
        if (!words)
        {
            return false;
        }
    }
    return !plan.tensors.empty();
}

} // namespace fake
