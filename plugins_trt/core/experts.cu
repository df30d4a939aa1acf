// The operators: checks of the caller's parameters, the layout of the workspace, and the steps of each operator.

#include "experts.h"

#include "launch.cuh"
#include "routing.cuh"

#include <algorithm>
#include <array>

namespace monoedge
{

namespace
{

/// The largest size: it fits into 32 bits with room for tiles, and the product of two fits into 64.
constexpr std::int64_t kMostOfASize{1 << 28};

/// How many int8 products, each at most 2^14, can be summed below 2^31.
constexpr std::int64_t kMostSummedInInt8{(1 << 17) - 1};

std::size_t aligned(std::size_t bytes)
{
    std::size_t constexpr kLine{256};
    return (bytes + kLine - 1) / kLine * kLine;
}

bool isAligned(void const* pointer, std::size_t bytes)
{
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

bool isSize(std::int64_t size)
{
    return size > 0 && size <= kMostOfASize;
}

/// Where the parts of the workspace begin, in bytes. The counts of rows are the first part.
struct Workspace
{
    std::size_t routingRows;    ///< [experts, rows] int32
    std::size_t quantizedInput; ///< [rows, in] int8
    std::size_t product;        ///< [rows, inter] 16 bits; a row in int8 fills the first half of its place.
    std::size_t size;

    Workspace(std::int64_t rows, std::int64_t in, std::int64_t inter)
    {
        auto const r = static_cast<std::size_t>(rows);
        routingRows = aligned(kExperts * sizeof(std::int32_t));
        quantizedInput = routingRows + aligned(kExperts * sizeof(std::int32_t) * r);
        product = quantizedInput + aligned(r * static_cast<std::size_t>(in));
        size = product + aligned(2 * r * static_cast<std::size_t>(inter));
    }
};

Format formatOf(Weight const& weight)
{
    return weight.scale == nullptr ? Format::kFloat
        : weight.inputScale == nullptr ? Format::kInt8Weight
                                       : Format::kInt8;
}

/// Whether these can be a matrix [.., in] and its scales.
bool isWeight(Weight const& weight, std::int64_t in)
{
    Format const format = formatOf(weight);
    bool const scalesFit = isAligned(weight.scale, sizeof(float)) && isAligned(weight.inputScale, sizeof(float))
        && (weight.scale != nullptr || weight.inputScale == nullptr);
    return weight.data != nullptr && scalesFit && (format != Format::kFloat || isAligned(weight.data, 2))
        && (format != Format::kInt8 || in <= kMostSummedInInt8);
}

/// Whether the fast paths can load the matrix in pieces of 16 bytes.
bool isFastWeight(Weight const& weight, std::int64_t in)
{
    std::int64_t const elements = formatOf(weight) == Format::kFloat ? 8 : 16;
    return isAligned(weight.data, kAlignment) && in % elements == 0;
}

/// Where rows lie.
struct Rows
{
    void const* data;
    std::int64_t stride; ///< In bytes.
};

/// What the steps of one call have in common.
struct Operator
{
    std::int64_t rows;
    std::int64_t in;
    void const* hiddenStates;
    bool const* visualMask;
    char* workspace;
    Workspace layout;
    Path path;

    /// A step without its experts.
    Step step(std::int64_t stepIn, std::int64_t out) const
    {
        auto const count = static_cast<std::int32_t>(rows);
        Routing const routing{reinterpret_cast<std::int32_t*>(workspace),
            reinterpret_cast<std::int32_t*>(workspace + layout.routingRows), count};
        return {count, static_cast<std::int32_t>(stepIn), static_cast<std::int32_t>(out), visualMask, routing, {}};
    }

    static StepExpert expert(Weight const& weight, Rows input, void* output, std::int64_t outputStride)
    {
        return {formatOf(weight), static_cast<char const*>(input.data), input.stride,
            static_cast<char const*>(weight.data), weight.scale, weight.inputScale, static_cast<char*>(output),
            outputStride, nullptr};
    }

    /// Where an expert of this format finds the hidden states.
    Rows inputFor(Weight const& weight) const
    {
        return formatOf(weight) == Format::kInt8 ? Rows{workspace + layout.quantizedInput, in}
                                                 : Rows{hiddenStates, 2 * in};
    }

    /// Enqueues what comes before the steps: the lists of rows, and the rows in int8.
    template <typename T>
    cudaError_t prepare(Step const& first, Weight const& text, Weight const& visual, cudaStream_t stream) const
    {
        if (path != Path::kDecode)
        {
            MONOEDGE_CHECK(
                launch(routeKernel, dim3(1), kRouteThreads, 0, stream, visualMask, first.rows, first.routing));
        }
        if (text.inputScale == nullptr && visual.inputScale == nullptr)
        {
            return cudaSuccess;
        }
        QuantizeRows const params{hiddenStates, reinterpret_cast<std::int8_t*>(workspace + layout.quantizedInput),
            visualMask, {text.inputScale, visual.inputScale}, first.in};
        return launch(quantizeKernel<T>, dim3(static_cast<unsigned>(rows)), kQuantizeThreads, 0, stream, params);
    }
};

template <typename T>
cudaError_t enqueue(Operator const& op, ExpertLinearParams const& params, cudaStream_t stream)
{
    Step step = op.step(params.in, params.out);
    step.experts[0] = Operator::expert(params.text, op.inputFor(params.text), params.output, 2 * params.out);
    step.experts[1] = Operator::expert(params.visual, op.inputFor(params.visual), params.output, 2 * params.out);
    MONOEDGE_CHECK(op.prepare<T>(step, params.text, params.visual, stream));
    return launchStep<T, false>(step, op.path, stream);
}

template <typename T>
cudaError_t enqueue(Operator const& op, FusedMoeParams const& params, cudaStream_t stream)
{
    char* const product = op.workspace + op.layout.product;
    Step gateUp = op.step(params.hidden, params.inter);
    Step down = op.step(params.inter, params.hidden);
    Weight const* const weights[kExperts][2]{
        {&params.textGateUp, &params.textDown}, {&params.visualGateUp, &params.visualDown}};
    for (int i = 0; i < kExperts; ++i)
    {
        auto const& [first, second] = weights[i];
        gateUp.experts[i] = Operator::expert(*first, op.inputFor(*first), product, 2 * params.inter);
        gateUp.experts[i].outputScale = second->inputScale;
        down.experts[i] = Operator::expert(*second, Rows{product, 2 * params.inter}, params.output, 2 * params.hidden);
    }
    MONOEDGE_CHECK(op.prepare<T>(gateUp, params.textGateUp, params.visualGateUp, stream));
    MONOEDGE_CHECK((launchStep<T, true>(gateUp, op.path, stream)));
    return launchStep<T, false>(down, op.path, stream);
}

/// A matrix, and how many places are summed in a product with it.
struct Matrix
{
    Weight const& weight;
    std::int64_t in;
};

/// What checks need to know of an operator's parameters.
template <std::size_t kMatrices>
struct Outline
{
    std::int64_t in;
    std::int64_t out;
    std::int64_t inter; ///< Size of the product, 0 where there is none.
    std::array<Matrix, kMatrices> matrices;

    template <typename Predicate>
    bool all(Predicate&& holds) const
    {
        return std::all_of(matrices.begin(), matrices.end(), holds);
    }
};

Outline<2> outlineOf(ExpertLinearParams const& params)
{
    return {params.in, params.out, 0, {{{params.text, params.in}, {params.visual, params.in}}}};
}

Outline<4> outlineOf(FusedMoeParams const& params)
{
    return {params.hidden, params.inter, params.inter,
        {{{params.textGateUp, params.hidden}, {params.visualGateUp, params.hidden}, {params.textDown, params.inter},
            {params.visualDown, params.inter}}}};
}

template <typename Params>
bool isFastCall(Params const& params)
{
    auto const outline = outlineOf(params);
    return outline.in % 8 == 0 && outline.out % 8 == 0 && isAligned(params.hiddenStates, kAlignment)
        && isAligned(params.output, kAlignment)
        && outline.all([](Matrix const& matrix) { return isFastWeight(matrix.weight, matrix.in); });
}

/// Checks the caller's parameters and enqueues.
template <typename Params>
cudaError_t enqueueChecked(Params const& params, cudaStream_t stream)
{
    auto const outline = outlineOf(params);
    bool const isType = params.type == Type::kFloat16 || params.type == Type::kBFloat16;
    if (!isType || !isSize(outline.in) || !isSize(outline.out) || params.rows < 0 || params.rows > kMostOfASize)
    {
        return cudaErrorInvalidValue;
    }
    if (params.rows == 0)
    {
        return cudaSuccess;
    }
    Workspace const layout{params.rows, outline.in, outline.inter};
    if (params.hiddenStates == nullptr || params.visualMask == nullptr || params.output == nullptr
        || params.workspace == nullptr || params.workspaceSize < layout.size || !isAligned(params.hiddenStates, 2)
        || !isAligned(params.output, 2) || !isAligned(params.workspace, kAlignment)
        || !outline.all([](Matrix const& matrix) { return isWeight(matrix.weight, matrix.in); }))
    {
        return cudaErrorInvalidValue;
    }
    Path const path = !isFastCall(params)      ? Path::kGeneric
        : params.rows <= DecodeTile::kMaxRows ? Path::kDecode
                                              : Path::kPrefill;
    Operator const op{params.rows, outline.in, params.hiddenStates, params.visualMask,
        static_cast<char*>(params.workspace), layout, path};
    return params.type == Type::kFloat16 ? enqueue<Float16>(op, params, stream) : enqueue<BFloat16>(op, params, stream);
}

} // namespace

std::size_t expertLinearWorkspace(std::int64_t rows, std::int64_t in, std::int64_t)
{
    return Workspace{rows, in, 0}.size;
}

std::size_t fusedMoeWorkspace(std::int64_t rows, std::int64_t hidden, std::int64_t inter)
{
    return Workspace{rows, hidden, inter}.size;
}

bool isFast(ExpertLinearParams const& params)
{
    return isFastCall(params);
}

bool isFast(FusedMoeParams const& params)
{
    return isFastCall(params);
}

cudaError_t expertLinear(ExpertLinearParams const& params, cudaStream_t stream)
{
    return enqueueChecked(params, stream);
}

cudaError_t fusedMoe(FusedMoeParams const& params, cudaStream_t stream)
{
    return enqueueChecked(params, stream);
}

int monoedgeExpertLinear(ExpertLinearParams const* params, cudaStream_t stream)
{
    return expertLinear(*params, stream);
}

int monoedgeFusedMoe(FusedMoeParams const* params, cudaStream_t stream)
{
    return fusedMoe(*params, stream);
}

std::size_t monoedgeExpertLinearWorkspace(std::int64_t rows, std::int64_t in, std::int64_t out)
{
    return expertLinearWorkspace(rows, in, out);
}

std::size_t monoedgeFusedMoeWorkspace(std::int64_t rows, std::int64_t hidden, std::int64_t inter)
{
    return fusedMoeWorkspace(rows, hidden, inter);
}

} // namespace monoedge
