// Small arithmetic of the advantage kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

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

// A sum of up to 2^22 numbers that has the same bits in any order: fixed point in two integers, relative to a bound of
// their absolute values; 80 bits in all.
struct Exact {
    long long high = 0, low = 0;
    double scale;

    __device__ explicit Exact(double bound) {
        int exponent = 0;
        frexp(bound, &exponent);
        scale = ldexp(1.0, 40 - (exponent < -900 ? -900 : exponent));
    }
    __device__ void add(double x) {
        x *= scale;
        const long long whole = (long long)x;
        high += whole;
        low += (long long)((x - (double)whole) * 0x1p40);
    }
    __device__ double value() const { return ((double)high + (double)low * 0x1p-40) / scale; }
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
