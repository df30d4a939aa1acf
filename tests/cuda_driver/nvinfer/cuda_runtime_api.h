// What TensorRT's headers take of CUDA's: the handles that their calls pass on.

#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
