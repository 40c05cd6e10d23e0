// The credit forms of prime_advantage on a GPU, in the stages of credit_params.h, in one cooperative launch.
//
// Tiles of a row are counted from its own start, or end, so that nothing depends on where it is packed. What is added up
// over rows is exact, by Exact or in integers, so that the order of rows, warps and blocks leaves no trace.
#pragma once
#include "advantage_kernel.h"
#include "credit_math.h"

namespace prime {

struct Row {
    long long start, length, steps;
    __device__ Row(const CreditParams& p, int i) : start(p.offsets[i]), length(p.offsets[i + 1] - start) {
        steps = p.step ? p.step[start + length - 1] + 1ll : length;
    }
};

// The group's sum of outcomes and number of rows, by a block.
__device__ inline Fellows fellows_of(const CreditParams& p, Thread& t, int row) {
    const long long id = p.group[row];
    Exact sum(1);
    int count = 0;
    for (int i = t.index; i < p.rows; i += kThreads)
        if (p.group[i] == id) {
            sum.add(p.outcome[i]);
            ++count;
        }
    sum.high = t.block_reduce(sum.high, Add());
    sum.low = t.block_reduce(sum.low, Add());
    count = t.block_reduce(count, Add());
    if (!t.index && count < 2) t.shared.bad = 1;
    return Fellows(p, p.outcome[row], sum.value(), max(count, 2));
}

// Token rewards, score and, of each step, the sum of q up to its end. Sets shared.bad for a bad step or reward.
template <typename T>
__device__ void prefixes(const CreditParams& p, Thread& t, int row) {
    const long long start = p.offsets[row], length = p.offsets[row + 1] - start;
    double* staged = t.shared.reduced[1] + t.warp * kWarpTile;  // block_reduce has the first one
    double carry = 0, total = 0;
    bool bad = false;
    for (long long base = 0; base < length; base += kTile) {
        for (int k = 0; k < kItems; ++k) {
            const long long n = base + t.warp * kWarpTile + k * 32 + t.lane;
            double q = 0;
            if (n < length) {
                if (p.prm) {
                    const float prm = to_float(stream_load(static_cast<const T*>(p.prm) + start + n));
                    q = double(prm) - double(to_float(stream_load(static_cast<const T*>(p.ref) + start + n)));
                }
                const float r = float(p.beta * q);
                p.reward[start + n] = r;
                total += r;
                if (p.step) {
                    const long long rise = n ? (long long)p.step[start + n] - p.step[start + n - 1] : 0;
                    bad |= n ? rise != 0 && rise != 1 : p.step[start] != 0;
                }
            }
            staged[k * 32 + t.lane] = q;
        }
        if (!p.process) continue;
        double x[kItems];
        __syncwarp();
        for (int k = 0; k < kItems; ++k) x[k] = staged[t.lane * kItems + k];
        __syncwarp();
        t.scan<false>(x, carry, p.discount, 1);
        for (int k = 0; k < kItems; ++k) {
            const long long n = base + t.place() + k;
            if (n >= length) break;
            if (!p.step) {
                p.prefix[start + n] = x[k];
            } else if (n == length - 1 || p.step[start + n + 1] != p.step[start + n]) {
                const int step = p.step[start + n];
                if (step >= 0 && step <= n) p.prefix[start + step] = x[k];
            }
        }
    }
    total = t.block_reduce(total, Add());
    const bool any = t.block_reduce(int(bad), Add());
    if (t.index) return;
    p.score[row] = float(total);
    if (any || (p.process && !isfinite(total))) t.shared.bad = 1;
}

// The process term of each step; of ODDS the largest, and an empty place in `index` for every step.
__device__ inline double terms(const CreditParams& p, Thread& t, int i, const Fellows& fellows, double lane_power) {
    const Row row(p, i);
    double *prefix = p.prefix + row.start, *term = p.term + row.start, largest = 0, carry = 0;
    const bool odds = p.credit == ODDS;
    if (!odds) {
        for (long long j = t.index; j < row.steps; j += kThreads) prefix[j] = fellows.value(p, prefix[j], j + 1);
        __syncthreads();
    }
    const auto of_step = [&](long long j) {
        const bool last = j == row.steps - 1;
        const double before = j ? prefix[j - 1] : odds ? 0 : fellows.start;
        return term_of(p.credit, fellows, before, prefix[j], prefix[last ? j : j + 1], last, p.outcome[i]);
    };
    if (p.credit == TD) {
        for (long long base = 0; base < row.steps; base += kTile) {  // from the row's end on
            double x[kItems];
            const long long from = row.steps - 1 - base - t.place();
            for (int k = 0; k < kItems; ++k) x[k] = from - k >= 0 ? of_step(from - k) : 0;
            t.scan<true>(x, carry, p.discount, lane_power);
            for (int k = 0; k < kItems; ++k)
                if (from - k >= 0) term[from - k] = x[k];
        }
        return 0;
    }
    for (long long j = t.index; j < row.steps; j += kThreads) {
        const double x = term[j] = of_step(j);
        largest = fmax(largest, fabs(x));
        if (odds) p.index[j] = p.index[p.tokens + j] = p.index[2 * p.tokens + j] = 0;
    }
    return odds ? t.block_reduce(largest, Max()) : 0;
}

template <typename T>
__device__ void rows_stage(const CreditParams& p, Thread& t) {
    const double lane_power = power(p.gamma, t.lane * kItems).last;
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const long long start = p.offsets[row], end = p.offsets[row + 1];
        const double outcome = p.outcome[row];
        const bool good = start >= 0 && start < end && end <= p.tokens && (row || !start) &&
                          (row < p.rows - 1 || end == p.tokens) && outcome >= 0 && outcome <= 1;
        double peak = INFINITY;
        __syncthreads();
        if (!t.index) t.shared.bad = 0;
        __syncthreads();
        if (good) {
            const Fellows fellows = fellows_of(p, t, row);
            prefixes<T>(p, t, row);
            __syncthreads();
            if (!t.shared.bad) {
                if (!t.index) p.coefficients[row] = p.outcome_weight * (outcome - fellows.others);
                peak = p.process ? terms(p, t, row, fellows, lane_power) : 0;
            }
        }
        if (!t.index) p.peaks[row] = peak;
    }
}

// INDEX: a row's steps to the sums of their index.
__device__ inline void index_row(const CreditParams& p, Thread& t, int i, double bound) {
    const Row row(p, i);
    auto* index = reinterpret_cast<unsigned long long*>(p.index);
    Exact sum(bound);
    for (long long j = t.index; j < row.steps; j += kThreads) {
        sum.high = sum.low = 0;
        sum.add(p.term[row.start + j]);
        atomicAdd(index + j, (unsigned long long)sum.high);
        atomicAdd(index + p.tokens + j, (unsigned long long)sum.low);
        atomicAdd(index + 2 * p.tokens + j, 1ull);
    }
}

// DEVIATIONS
__device__ inline void deviations_row(const CreditParams& p, Thread& t, int i, double bound) {
    const Row row(p, i);
    Exact sum(bound);
    double squares = 0;
    for (long long j = t.index; j < row.steps; j += kThreads) {
        sum.high = load(p.index + j), sum.low = load(p.index + p.tokens + j);
        const double x = p.term[row.start + j] -= sum.value() / double(load(p.index + 2 * p.tokens + j));
        squares += x * x;
    }
    squares = t.block_reduce(squares, Add());
    if (t.index) return;
    p.totals[4ll * i + 2] = squares;
    p.totals[4ll * i + 3] = double(row.steps);
}

// A row's advantages before whitening: f(token, x).
template <typename F>
__device__ void each_token(const CreditParams& p, Thread& t, int i, double spread, double outcome_at, double outcome_tile, F f) {
    const Row row(p, i);
    double outcome = load(p.coefficients + i) * outcome_at;
    for (long long n = row.length - 1 - t.index; n >= 0; n -= kThreads) {
        double x = outcome;
        if (p.process) {
            double term = p.term[row.start + (p.step ? p.step[row.start + n] : n)];
            if (p.credit == ODDS) term = fmin(kClip, fmax(-kClip, term * spread));
            x += p.process_weight * term;
        }
        f(row.start + n, x);
        outcome *= outcome_tile;
    }
}

// The sum over rows of a field of `totals`, by a block.
__device__ inline double sum_rows(const CreditParams& p, Thread& t, int field) {
    double most = 0;
    for (int i = t.index; i < p.rows; i += kThreads) most = fmax(most, fabs(load(p.totals + 4ll * i + field)));
    Exact sum(t.block_reduce(most, Max()));
    for (int i = t.index; i < p.rows; i += kThreads) sum.add(load(p.totals + 4ll * i + field));
    sum.high = t.block_reduce(sum.high, Add());
    sum.low = t.block_reduce(sum.low, Add());
    return sum.value();
}

template <typename T, typename Sync>
__device__ void run_credit(const CreditParams& p, Thread& t, Sync sync_grid) {
    const auto runs = [&](int stage) { return p.first <= stage && stage <= p.last; };
    const auto each_row = [&](auto f) {
        for (int row = blockIdx.x; row < p.rows; row += gridDim.x) f(row);
    };
    const bool odds = p.process && p.credit == ODDS;
    double peak = p.moments[3];
    if (runs(ROWS)) {
        rows_stage<T>(p, t);
        sync_grid();
        peak = 0;
        for (int i = t.index; i < p.rows; i += kThreads) peak = fmax(peak, load(p.peaks + i));
        peak = t.block_reduce(peak, Max());
        if (!t.index && !blockIdx.x) p.moments[3] = peak;
        if (peak == INFINITY) {  // nothing of a bad batch is used: the rows and offsets may be anything
            for (long long i = blockIdx.x * kThreads + t.index; i < p.tokens; i += (long long)gridDim.x * kThreads)
                p.advantage[i] = NAN;
            return;
        }
    }
    double mean = p.first > SUMS ? p.moments[0] : 0, inverse_std = p.first > SUMS ? p.moments[1] : 1;
    double spread = p.first > DEVIATIONS && odds ? p.moments[2] : 0;
    if (odds && runs(INDEX)) {
        each_row([&](int row) { index_row(p, t, row, peak); });
        sync_grid();
    }
    if (odds && runs(DEVIATIONS)) {
        each_row([&](int row) { deviations_row(p, t, row, peak); });
        sync_grid();
        spread = 1 / (sqrt(sum_rows(p, t, 2) / sum_rows(p, t, 3)) + kLogRatioFloor);
    }
    const double outcome_at = power(p.outcome_gamma, t.index).last, outcome_tile = power(p.outcome_gamma, kThreads).last;
    if (p.whiten && runs(SUMS)) {
        each_row([&](int row) {
            double sum = 0, squares = 0;
            each_token(p, t, row, spread, outcome_at, outcome_tile, [&](long long, double x) {
                sum += x;
                squares += x * x;
            });
            sum = t.block_reduce(sum, Add());
            squares = t.block_reduce(squares, Add());
            if (!t.index) p.totals[4ll * row] = sum, p.totals[4ll * row + 1] = squares;
        });
        sync_grid();
        const double sum = sum_rows(p, t, 0), squares = sum_rows(p, t, 1);
        mean = sum / p.tokens;
        inverse_std = 1 / sqrt(fmax(0.0, squares - mean * sum) / (p.tokens > 1 ? p.tokens - 1 : 1) + 1e-8);
    }
    if (!p.whiten) mean = 0, inverse_std = 1;
    if (!runs(WRITE)) return;
    each_row([&](int row) {
        each_token(p, t, row, spread, outcome_at, outcome_tile,
                   [&](long long token, double x) { stream_store(p.advantage + token, float((x - mean) * inverse_std)); });
    });
}

}  // namespace prime
