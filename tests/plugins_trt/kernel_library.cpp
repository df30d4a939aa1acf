// The kernels behind C functions, for ctypes: experts.cu compiled for a CPU or for a GPU, and this linked to it.

#include "experts.h"

extern "C" int monoedgeExpertLinear(monoedge::ExpertLinearParams const* params, cudaStream_t stream)
{
    return monoedge::expertLinear(*params, stream);
}

extern "C" int monoedgeFusedMoe(monoedge::FusedMoeParams const* params, cudaStream_t stream)
{
    return monoedge::fusedMoe(*params, stream);
}

extern "C" std::size_t monoedgeExpertLinearWorkspace(std::int64_t rows, std::int64_t in, std::int64_t out)
{
    return monoedge::expertLinearWorkspace(rows, in, out);
}

extern "C" std::size_t monoedgeFusedMoeWorkspace(std::int64_t rows, std::int64_t hidden, std::int64_t inter)
{
    return monoedge::fusedMoeWorkspace(rows, hidden, inter);
}

#ifdef MONOEDGE_EMULATION
#include "prefill.cuh"

extern "C" void monoedgeEmulate(
    int processors, bool backwards, int failingLaunch, cudaError_t failure, char const* watched, std::size_t size)
{
    emulation::observer = {processors, 0, failingLaunch, failure, watched, size, 0};
    emulation::block.backwards = backwards;
}

extern "C" int monoedgeLaunches()
{
    return emulation::observer.launches;
}

extern "C" std::size_t monoedgeCopiedBytes()
{
    return emulation::observer.copiedBytes;
}

/// Bytes from the begin of 64 lines in shared memory.
extern "C" int monoedgePlaceOf(int line, int chunk)
{
    return monoedge::placeOf<64>(line, chunk);
}
#endif
