// What tests set and ask in a library of kernels that was compiled for a CPU, for ctypes.

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
