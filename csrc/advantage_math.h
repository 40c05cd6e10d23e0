// Small arithmetic of the advantage kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "exact.h"

namespace prime {

struct Power {
    double last, sum;  // x^n, 1 + x + .. + x^(n-1)
};

__host__ __device__ inline Power power(double x, int n) {
    Power result{1, 0}, step{x, 1};
    for (; n; n >>= 1) {
        if (n & 1) {
            result.sum = step.sum + step.last * result.sum;
            result.last *= step.last;
        }
        step.sum += step.last * step.sum;
        step.last *= step.last;
    }
    return result;
}

struct Add {
    template <typename T>
    __device__ T operator()(T a, T b) const { return a + b; }
};

struct Min {
    __device__ double operator()(double a, double b) const { return fmin(a, b); }
};

struct Max {
    __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Inputs are read once; what another block wrote is read past the L1 cache; advantages are not read again.
template <typename T>
__device__ T stream_load(const T* p) { return __ldcs(p); }
template <typename T>
__device__ T load(const T* p) { return __ldcg(p); }
__device__ inline void stream_store(float* p, float x) { __stcs(p, x); }

}  // namespace prime
