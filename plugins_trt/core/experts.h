// The operators' kernels: plain data in, status out. Knows CUDA and nothing else.
//
// All pointers are device pointers. Work goes to the caller's stream and workspace. Nothing is allocated and nothing
// waits for the device, so every call may be captured in a CUDA graph. Matrices are row-major; weights are stored as
// plugins_trt/schema.py says, [out, in].

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace monoedge
{

/// Number format of activations, and of weights that are not quantized. Sums are in float.
enum class Type : std::int32_t
{
    kFloat16,
    kBFloat16,
};

/// One expert's matrix, [out, in].
struct Weight
{
    void const* data;                 ///< Type elements, or int8 where `scale` is given.
    float const* scale{nullptr};      ///< [out]: the matrix is int8 times this, row by row. Null: not quantized.
    float const* inputScale{nullptr}; ///< [1]: activations are int8 too, x / inputScale rounded half to even and
                                      ///< saturated to [-128, 127]; NaN becomes 0. At most 131071 places are summed.
};

/// Row r of output is weight_e · row r of hiddenStates, with e chosen by visualMask[r].
struct ExpertLinearParams
{
    Type type;
    std::int64_t rows; ///< batch · sequence; may be 0.
    std::int64_t in;
    std::int64_t out;
    void const* hiddenStates; ///< [rows, in]
    bool const* visualMask;   ///< [rows]
    Weight text;              ///< [out, in]
    Weight visual;            ///< [out, in]
    void* output;             ///< [rows, out]; does not overlap any input.
    void* workspace;
    std::size_t workspaceSize; ///< at least expertLinearWorkspace(rows, in, out)
};

/// Row r of output is down_e · (silu(gate_e · x) * (up_e · x)) with x row r of hiddenStates, e chosen by visualMask[r].
struct FusedMoeParams
{
    Type type;
    std::int64_t rows; ///< batch · sequence; may be 0.
    std::int64_t hidden;
    std::int64_t inter;
    void const* hiddenStates; ///< [rows, hidden]
    bool const* visualMask;   ///< [rows]
    Weight textGateUp;        ///< [2 · inter, hidden]: gate rows, then up rows
    Weight textDown;          ///< [hidden, inter]
    Weight visualGateUp;      ///< as the text expert's
    Weight visualDown;        ///< as the text expert's
    void* output;             ///< [rows, hidden]; does not overlap any input.
    void* workspace;
    std::size_t workspaceSize; ///< at least fusedMoeWorkspace(rows, hidden, inter)
};

/// What addresses of rows, matrices and output must be a multiple of on the fast paths, and the workspace's always.
inline constexpr std::size_t kAlignment{16};

/// Whether a call takes the fast paths, as far as sizes and addresses decide. The other is many times slower.
bool isFast(ExpertLinearParams const& params);
bool isFast(FusedMoeParams const& params);

/// Bytes of workspace for up to `rows` rows. They grow with each argument, so a profile's maximum serves all below it.
std::size_t expertLinearWorkspace(std::int64_t rows, std::int64_t in, std::int64_t out);
std::size_t fusedMoeWorkspace(std::int64_t rows, std::int64_t hidden, std::int64_t inter);

/// Enqueues the operator. Returns cudaErrorInvalidValue for parameters that cannot be, else the status of the launches.
cudaError_t expertLinear(ExpertLinearParams const& params, cudaStream_t stream);
cudaError_t fusedMoe(FusedMoeParams const& params, cudaStream_t stream);

/// The same for callers without a compiler, found by name in the loaded library. The first two return a cudaError_t.
extern "C" __attribute__((visibility("default"))) int monoedgeExpertLinear(
    ExpertLinearParams const* params, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) int monoedgeFusedMoe(
    FusedMoeParams const* params, cudaStream_t stream);
extern "C" __attribute__((visibility("default"))) std::size_t monoedgeExpertLinearWorkspace(
    std::int64_t rows, std::int64_t in, std::int64_t out);
extern "C" __attribute__((visibility("default"))) std::size_t monoedgeFusedMoeWorkspace(
    std::int64_t rows, std::int64_t hidden, std::int64_t inter);

} // namespace monoedge
