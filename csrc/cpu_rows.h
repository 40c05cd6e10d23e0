// What the passes over rows of tokens share on the CPU.
#pragma once
#include <cstdint>
#include <cstring>

namespace prime::cpu {

constexpr int kBlock = 512, kLanes = 4;

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// x_n += gamma x_{n-1} for n = 0 .. count-1, count rounded up to kLanes; x_{-1} = carry. Returns the last of them.
// Four elements first without the carry: the chain of dependent operations is one per four.
inline double scan(double* x, int count, double carry, const double* gamma) {
    for (int n = 0; n < count; n += kLanes) {
        for (int k = 1; k < kLanes; ++k) x[n + k] += gamma[1] * x[n + k - 1];
        for (int k = 0; k < kLanes; ++k) x[n + k] += gamma[k + 1] * carry;
        carry = x[n + kLanes - 1];
    }
    return x[count - 1];
}

inline bool ascending(const int32_t* offsets, int64_t rows, int64_t tokens) {
    bool good = offsets[0] == 0 && offsets[rows] == tokens;
    for (int64_t i = 0; i < rows; ++i) good &= offsets[i] < offsets[i + 1];
    return good;
}

}  // namespace prime::cpu
