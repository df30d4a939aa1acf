// Times FusedMoE on the GPU of this machine, for the sizes of Mono-InternVL-2B: microseconds a layer, and what that is
// in bytes of weights and operations a second.
//
//   nvcc -std=c++17 -O3 -arch=native -I plugins_trt/core benchmarks/kernels.cu plugins_trt/core/*.cu -o build/kernels
//   build/kernels
//   build/kernels bf16 2900    # runs three layers of this format and so many rows, and times nothing: for profilers
//
// A CUDA graph runs as many layers as it takes to have four times the L2 cache in weights, so that weights come from
// memory as they do in a model; the time is the median of 20 replays, divided by the layers. Left out: everything but
// this operator, and what the clocks do in a long run (fix them, or watch them with nvidia-smi or tegrastats).

#include "experts.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <vector>

namespace
{

constexpr std::int64_t kHidden{2048};
constexpr std::int64_t kInter{8192};
constexpr int kReplays{20};

void check(cudaError_t status)
{
    if (status != cudaSuccess)
    {
        std::fprintf(stderr, "error: %s: %s\n", cudaGetErrorName(status), cudaGetErrorString(status));
        std::exit(1);
    }
}

/// bf16 numbers with any sign and a magnitude from 0.5 to 1; what they are as int8 or in a workspace does not matter.
__global__ void fill(std::uint16_t* elements, std::size_t count)
{
    for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    {
        std::uint32_t hash = static_cast<std::uint32_t>(i) * 2654435761U;
        hash ^= hash >> 15;
        elements[i] = static_cast<std::uint16_t>(0x3F00U | (hash & 0x807FU));
    }
}

void* allocate(std::size_t bytes)
{
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, bytes));
    fill<<<256, 256>>>(static_cast<std::uint16_t*>(pointer), bytes / 2);
    check(cudaGetLastError());
    return pointer;
}

float* allocateScales(std::int64_t count)
{
    std::vector<float> const scales(static_cast<std::size_t>(count), 1.0e-3F);
    float* pointer = nullptr;
    check(cudaMalloc(&pointer, scales.size() * sizeof(float)));
    check(cudaMemcpy(pointer, scales.data(), scales.size() * sizeof(float), cudaMemcpyHostToDevice));
    return pointer;
}

enum class Format
{
    kBFloat16,
    kW8A16,
    kW8A8,
};

struct Case
{
    Format format;
    std::int64_t rows;
    std::int64_t visualRows;
};

char const* nameOf(Format format)
{
    return format == Format::kBFloat16 ? "bf16" : format == Format::kW8A16 ? "w8a16" : "w8a8";
}

/// Both matrices of one expert.
struct Expert
{
    monoedge::Weight gateUp;
    monoedge::Weight down;
};

Expert makeExpert(Format format)
{
    std::size_t const elements = format == Format::kBFloat16 ? 2 : 1;
    Expert expert{{allocate(elements * 2 * kInter * kHidden)}, {allocate(elements * kHidden * kInter)}};
    if (format != Format::kBFloat16)
    {
        expert.gateUp.scale = allocateScales(2 * kInter);
        expert.down.scale = allocateScales(kHidden);
    }
    if (format == Format::kW8A8)
    {
        expert.gateUp.inputScale = allocateScales(1);
        expert.down.inputScale = allocateScales(1);
    }
    return expert;
}

void release(Expert const& expert)
{
    for (monoedge::Weight const& weight : {expert.gateUp, expert.down})
    {
        for (void const* pointer : {weight.data, static_cast<void const*>(weight.scale),
                 static_cast<void const*>(weight.inputScale)})
        {
            check(cudaFree(const_cast<void*>(pointer)));
        }
    }
}

float medianMicroseconds(cudaGraphExec_t graph, cudaStream_t stream)
{
    cudaEvent_t begin;
    cudaEvent_t end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < kReplays + 3; ++i)
    {
        check(cudaEventRecord(begin, stream));
        check(cudaGraphLaunch(graph, stream));
        check(cudaEventRecord(end, stream));
        check(cudaEventSynchronize(end));
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin, end));
        times.push_back(1000 * milliseconds);
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    std::sort(times.begin() + 3, times.end());
    return times[3 + kReplays / 2];
}

/// The layers of a case. Text is in the case's format, the visual expert in bf16, as in a quantized bundle.
class Layers
{
public:
    Layers(Case const& now, int layers)
        : mCase{now}
        , mVisual{makeExpert(Format::kBFloat16)}
    {
        for (int i = 0; i < layers; ++i)
        {
            mTexts.push_back(makeExpert(now.format));
        }
        std::vector<char> mask(static_cast<std::size_t>(now.rows), 0);
        std::fill_n(mask.begin(), now.visualRows, 1);
        mMask = allocate(mask.size() + 1);
        check(cudaMemcpy(mMask, mask.data(), mask.size(), cudaMemcpyHostToDevice));
        mInput = allocate(2 * now.rows * kHidden);
        mOutput = allocate(2 * now.rows * kHidden);
        mWorkspaceSize = monoedge::fusedMoeWorkspace(now.rows, kHidden, kInter);
        mWorkspace = allocate(mWorkspaceSize);
        check(cudaDeviceSynchronize());
    }

    Layers(Layers const&) = delete;
    Layers& operator=(Layers const&) = delete;

    ~Layers()
    {
        std::for_each(mTexts.begin(), mTexts.end(), release);
        release(mVisual);
        for (void* const pointer : {mMask, mInput, mOutput, mWorkspace})
        {
            check(cudaFree(pointer));
        }
    }

    void enqueue(cudaStream_t stream) const
    {
        for (Expert const& text : mTexts)
        {
            monoedge::FusedMoeParams const params{monoedge::Type::kBFloat16, mCase.rows, kHidden, kInter, mInput,
                static_cast<bool const*>(mMask), text.gateUp, text.down, mVisual.gateUp, mVisual.down, mOutput,
                mWorkspace, mWorkspaceSize};
            check(monoedge::fusedMoe(params, stream));
        }
    }

private:
    Case mCase;
    Expert mVisual;
    std::vector<Expert> mTexts;
    void* mMask;
    void* mInput;
    void* mOutput;
    void* mWorkspace;
    std::size_t mWorkspaceSize;
};

void measure(Case const& now, int l2Bytes, cudaStream_t stream)
{
    std::int64_t const textBytes = (now.format == Format::kBFloat16 ? 2 : 1) * 3 * kHidden * kInter;
    int const count = static_cast<int>(std::max<std::int64_t>(4, 4 * std::int64_t{l2Bytes} / textBytes));
    Layers const layers{now, count};
    cudaGraph_t graph;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    layers.enqueue(stream);
    check(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable;
    check(cudaGraphInstantiate(&executable, graph, 0));
    double const microseconds = medianMicroseconds(executable, stream) / count;

    double const weightBytes
        = (now.rows > now.visualRows ? textBytes : 0) + (now.visualRows > 0 ? 6.0 * kHidden * kInter : 0);
    double const operations = 6.0 * static_cast<double>(now.rows) * kHidden * kInter;
    std::printf("| %s | %lld | %lld | %.1f | %.0f | %.1f |\n", nameOf(now.format), static_cast<long long>(now.rows),
        static_cast<long long>(now.visualRows), microseconds, weightBytes / microseconds / 1e3,
        operations / microseconds / 1e6);
    std::fflush(stdout);
    check(cudaGraphExecDestroy(executable));
    check(cudaGraphDestroy(graph));
}

constexpr Format kFormats[]{Format::kBFloat16, Format::kW8A16, Format::kW8A8};

/// Whole tiles of a picture and at least a row of text behind them.
std::int64_t visualRowsOf(std::int64_t rows)
{
    return (rows - 1) / 256 * 256;
}

int runForProfilers(char const* name, char const* rowsText, cudaStream_t stream)
{
    std::int64_t const rows = std::atoll(rowsText);
    auto const* const format = std::find_if(
        std::begin(kFormats), std::end(kFormats), [&](Format each) { return std::strcmp(nameOf(each), name) == 0; });
    if (format == std::end(kFormats) || rows < 1)
    {
        std::fprintf(stderr, "error: expected bf16, w8a16 or w8a8, and a number of rows\n");
        return 2;
    }
    Layers const layers{{*format, rows, visualRowsOf(rows)}, 3};
    layers.enqueue(stream);
    check(cudaStreamSynchronize(stream));
    return 0;
}

} // namespace

int main(int argc, char** argv)
{
    cudaStream_t stream;
    check(cudaStreamCreate(&stream));
    if (argc == 3)
    {
        return runForProfilers(argv[1], argv[2], stream);
    }
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    std::printf("%s, SM %d.%d, %d multiprocessors, %d MB of L2; FusedMoE, hidden %lld, inter %lld\n\n", properties.name,
        properties.major, properties.minor, properties.multiProcessorCount, properties.l2CacheSize >> 20,
        static_cast<long long>(kHidden), static_cast<long long>(kInter));
    std::printf("| text expert | rows | of them visual | µs | GB/s of weights | TFLOP/s |\n");
    std::printf("| --- | ---: | ---: | ---: | ---: | ---: |\n");
    for (Format const format : kFormats)
    {
        for (std::int64_t const rows : {1, 8, 16, 64, 320, 1280, 2900})
        {
            measure({format, rows, visualRowsOf(rows)}, properties.l2CacheSize, stream);
        }
    }
    check(cudaStreamDestroy(stream));
}
