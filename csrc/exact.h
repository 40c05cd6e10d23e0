// Sums whose bits do not depend on the order of what is added, on the CPU and on a GPU.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define ANYWHERE __host__ __device__
#else
#define ANYWHERE
#endif

namespace prime {

// A sum of up to 2^22 numbers that has the same bits in any order: fixed point in two integers, relative to a bound of
// their absolute values; 80 bits in all.
struct Exact {
    long long high = 0, low = 0;
    double scale;

    ANYWHERE explicit Exact(double bound) {
        int exponent = 0;
        frexp(bound, &exponent);
        scale = ldexp(1.0, 40 - (exponent < -900 ? -900 : exponent));
    }
    ANYWHERE void add(double x) {
        x *= scale;
        const long long whole = (long long)x;
        high += whole;
        low += (long long)((x - (double)whole) * 0x1p40);
    }
    ANYWHERE double value() const { return ((double)high + (double)low * 0x1p-40) / scale; }
};

}  // namespace prime
