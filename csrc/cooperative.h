// A cooperative launch of at most a block for each row.
#pragma once
#include <cooperative_groups.h>

#include "advantage_params.h"

namespace prime {

// `function` takes `p` alone. Returns the CUDA error as text, empty when there is none.
template <typename P>
const char* launch_blocks(const void* function, P& p, void* stream) {
    int device = 0, processors = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, kThreads, 0);
    if (!error) {
        const int blocks = p.rows < resident * processors ? p.rows : resident * processors;
        void* arguments[] = {&p};
        error = cudaLaunchCooperativeKernel(function, blocks, kThreads, arguments, 0, (cudaStream_t)stream);
    }
    return error ? cudaGetErrorString(error) : "";
}

}  // namespace prime
