// The arithmetic of the credit forms, on the CPU and on a GPU.
#pragma once
#include <cmath>
#include <cstring>

#include "credit_params.h"
#include "exact.h"

namespace prime {

constexpr double kClip = 3, kLogRatioFloor = 1e-6;  // as in prime_kernels/reference_credit.py

// e^x to 2e-16, without a branch, so that a compiler can do several at a time.
ANYWHERE inline double exp_of(double x) {
    x = x < -700 ? -700 : x > 700 ? 700 : x;
    constexpr double kRound = 0x1.8p52;  // + kRound: the nearest integer, in the last bits
    const double shifted = x * 1.4426950408889634 + kRound, power = shifted - kRound;
    const double rest = x - power * 0.6931471803691238 - power * 1.9082149292705877e-10;
    double result = 1. / 87178291200;  // its series, from the end
    result = result * rest + 1. / 6227020800; result = result * rest + 1. / 479001600;
    result = result * rest + 1. / 39916800; result = result * rest + 1. / 3628800;
    result = result * rest + 1. / 362880; result = result * rest + 1. / 40320;
    result = result * rest + 1. / 5040; result = result * rest + 1. / 720;
    result = result * rest + 1. / 120; result = result * rest + 1. / 24;
    result = result * rest + 1. / 6; result = result * rest + 1. / 2;
    result = (result * rest + 1) * rest + 1;
    long long bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (long long)((unsigned long long)(bits + 1023) << 52);
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return result * scale;
}

// What a row knows of its group.
struct Fellows {
    double others;   // mean outcome of the other rows and of the pseudo-rows
    double against;  // odds against success, before the first token
    double start;    // V_{-1}

    // all: the sum of the group's outcomes
    ANYWHERE Fellows(const CreditParams& p, double outcome, double all, int count) {
        const double sum = fmin(fmax(all - outcome, 0.), count - 1.), rows = fmax(p.shrink, 1.);
        others = (sum + p.shrink * p.prior) / (count - 1 + p.shrink);
        against = (count - 1 - sum + rows * (1 - p.prior)) / (sum + rows * p.prior);
        start = 1 / (1 + against);
    }
    // V, from the sum of q over so many steps
    ANYWHERE double value(const CreditParams& p, double sum, double steps) const {
        return 1 / (1 + exp_of(p.slope * (p.drift * steps - p.beta * sum)) * against);
    }
};

// The process term of a step from V (ODDS: the sum of q) before it, at its end, and at the end of the next one; of TD
// the difference that is then summed from the row's end on.
ANYWHERE inline double term_of(int credit, const Fellows& row, double before, double here, double after, bool last,
                               double outcome) {
    switch (credit) {
        case CRITIC: return row.start - before;
        case LOOKAHEAD: return after - before;
        case TD: return (last ? outcome - (row.others - row.start) : here) - before;
        default: return here - before;  // PAV, ODDS
    }
}

}  // namespace prime
