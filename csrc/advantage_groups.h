// The rows' arithmetic between the two passes, and the whole of prime_advantage on a GPU.
#pragma once
#include "advantage_kernel.h"

namespace prime {

// The rows of one group, held by a warp.
struct Group {
    const Params& p;
    int lane, first, count;
    long long id;
    const int* list;  // of all `count` rows, or null

    template <typename F>
    __device__ void each(F f) const {
        if (list) {
#pragma unroll 1  // or the registers spill
            for (int i = lane; i < count; i += 32) f(list[i]);
        } else {
#pragma unroll 1
            for (int row = first + lane; row < p.rows; row += 32)
                if (p.group[row] == id) f(row);
        }
    }

    template <typename F>
    __device__ double sum(double bound, F f) const {
        Exact sum(bound);
        each([&](int row) { sum.add(f(row)); });
        sum.high = Thread::warp_reduce(sum.high, Add());
        sum.low = Thread::warp_reduce(sum.low, Add());
        return sum.value();
    }
    template <typename F>
    __device__ double largest(F f) const {
        double most = 0;
        each([&](int row) { most = fmax(most, fabs(f(row))); });
        return Thread::warp_reduce(most, Max());
    }
};

// A term x of a row with value v enters the advantage as (x - center) * scale. Relative to the smallest value of the
// group, so that equal values give exactly 0. `unit` divides every value.
struct Baseline {
    int estimator;
    double smallest = 0, mean = 0, scale = 1, count;

    template <typename F>
    __device__ Baseline(const Group& g, double unit, F value) : estimator(g.p.estimator), count(g.count) {
        if (estimator == REINFORCE) return;
        double low = INFINITY;
        g.each([&](int row) { low = fmin(low, value(row)); });
        low = smallest = Thread::warp_reduce(low, Min());
        const double range = g.largest([&](int row) { return value(row) - low; });
        const double middle = mean = g.sum(range, [&](int row) { return value(row) - low; }) / count;
        if (estimator == RLOO_RUN) scale = count / (count - 1);
        if (estimator == GRPO) {
            const double squares = g.sum(range * range, [&](int row) {
                const double d = value(row) - low - middle;
                return d * d;
            });
            scale = squares > 0 ? 1 / (sqrt(squares / (count - 1)) / unit + 1e-6) : 0;
        }
    }
    __device__ double center(double v) const {
        if (estimator == RLOO_PAPER) return smallest + (count * mean - (v - smallest)) / (count - 1);
        return smallest + mean;
    }
};

__device__ inline double row_sum(const Params& p, Field field, int row) { return load(p.sums + field * (long long)p.rows + row); }

// The sums of a row's advantages, before whitening, and of their squares.
__device__ inline double sum_of(const Params& p, int row) {
    const Coefficients x(p, row);
    return x.a * row_sum(p, S, row) + x.b * row_sum(p, G, row) + x.c * row_sum(p, O, row);
}
__device__ inline double squares_of(const Params& p, int row) {
    const Coefficients x(p, row);
    return x.a * (x.a * row_sum(p, SS, row) + 2 * (x.b * row_sum(p, SG, row) + x.c * row_sum(p, SO, row))) +
           x.b * (x.b * row_sum(p, GG, row) + 2 * x.c * row_sum(p, GO, row)) + x.c * x.c * row_sum(p, OO, row);
}

// The group of `row` if that is its first row: coefficients of its rows, and their moments. By a warp.
__device__ inline void group_of(const Params& p, Thread& t, int row, double unit) {
    const long long id = p.group[row];
#pragma unroll 1
    for (int from = row; from > 0; from -= 32)
        if (__any_sync(kAll, from > t.lane && p.group[max(0, from - 1 - t.lane)] == id)) return;
    Group g{p, t.lane, row, 0, id, t.shared.members[t.warp]};
    for (int from = row; from < p.rows; from += 32) {
        const bool member = from + t.lane < p.rows && p.group[min(p.rows - 1, from + t.lane)] == id;
        const unsigned members = __ballot_sync(kAll, member);
        const int place = g.count + __popc(members & ((1u << t.lane) - 1));
        if (member && place < kMembers) t.shared.members[t.warp][place] = from + t.lane;
        g.count += __popc(members);
    }
    __syncwarp();
    if (g.count > kMembers) g.list = nullptr;
    if (g.count == 1 && p.estimator != REINFORCE) {
        if (!t.lane) p.status[0] = 1;
        return;
    }
    if (p.process) {
        const auto reward = [&](int i) { return row_sum(p, TOTAL, i) / (p.offsets[i + 1] - p.offsets[i]); };
        const Baseline process(g, unit, reward);
        const double a = p.process_weight * process.scale / unit;
        g.each([&](int i) {
            p.coefficients[i] = a;
            p.coefficients[p.rows + i] = -a * process.center(reward(i));
        });
    } else {
        g.each([&](int i) { p.coefficients[i] = p.coefficients[p.rows + i] = 0; });
    }
    const auto outcome = [&](int i) { return double(p.outcome[i]); };
    const Baseline verified(g, 1, outcome);
    const double c = p.outcome_weight * verified.scale;
    g.each([&](int i) { p.coefficients[2ll * p.rows + i] = c * (outcome(i) - verified.center(outcome(i))); });
    if (!p.whiten) return;
    const auto sum = [&](int i) { return sum_of(p, i); };
    const auto squares = [&](int i) { return squares_of(p, i); };
    const double total = g.sum(g.largest(sum), sum), total_squares = g.sum(g.largest(squares), squares);
    if (t.lane) return;
    const int slot = atomicAdd(p.status + 1, 1);
    p.totals[2 * slot] = total;
    p.totals[2 * slot + 1] = total_squares;
}

// The sum of x_0, x_2, .. by a block.
__device__ inline double sum_totals(Thread& t, const double* x, int count) {
    double most = 0;
    for (int i = t.index; i < count; i += kThreads) most = fmax(most, fabs(load(x + 2 * i)));
    Exact sum(t.block_reduce(most, Max()));
#pragma unroll 1
    for (int i = t.index; i < count; i += kThreads) sum.add(load(x + 2 * i));
    sum.high = t.block_reduce(sum.high, Add());
    sum.low = t.block_reduce(sum.low, Add());
    return sum.value();
}

template <typename T, bool kDiscounted, typename Sync>
__device__ void run(const Params& p, Thread& t, Sync sync_grid) {
    double mean = 0, inverse_std = 1;
    if (p.phase != ONLY_WRITE) {
        double peak = 0;
        if (!t.index) t.shared.bad = 0;
        if (!t.index && !blockIdx.x) p.status[0] = p.status[1] = 0;
        __syncthreads();
        for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
            const long long start = p.offsets[row], end = p.offsets[row + 1];
            const bool good = start >= 0 && start < end && end <= p.tokens && (row || !start) &&
                              (row < p.rows - 1 || end == p.tokens) && isfinite(p.outcome[row]);
            if (good) sum_row<T, kDiscounted>(p, t, row);
            if (!t.index) peak = good ? fmax(peak, p.sums[row]) : INFINITY;
            if (!good && !t.index) p.sums[row] = INFINITY;
        }
        __syncthreads();
        if (!t.index) p.peaks[blockIdx.x] = t.shared.bad ? INFINITY : peak;
        if (p.phase == ONLY_SUMS) return;
        sync_grid();

        peak = 0;
        for (int i = t.index; i < gridDim.x; i += kThreads) peak = fmax(peak, load(p.peaks + i));
        peak = t.block_reduce(peak, Max());
        const bool sums_good = peak < INFINITY;
        if (sums_good) {
            const double unit = p.normalize ? peak + 1e-6 * p.beta : 1;
            for (int row = blockIdx.x + gridDim.x * t.warp; row < p.rows; row += gridDim.x * kWarps) group_of(p, t, row, unit);
        } else if (!t.index) {
            p.status[0] = 1;
        }
        sync_grid();
        if (load(p.status)) {  // nothing of a bad batch is used: the rows and offsets may be anything
            for (long long i = blockIdx.x * kThreads + t.index; i < p.tokens; i += (long long)gridDim.x * kThreads)
                p.advantage[i] = NAN;
            return;
        }
        if (p.whiten) {
            const int groups = load(p.status + 1);
            const double sum = sum_totals(t, p.totals, groups), squares = sum_totals(t, p.totals + 1, groups);
            mean = sum / p.tokens;
            const double variance = fmax(0.0, (squares - mean * sum) / (p.tokens > 1 ? p.tokens - 1 : 1));
            inverse_std = 1 / sqrt(variance + 1e-8);
        }
    } else {
        mean = p.moments[0];
        inverse_std = p.moments[1];
    }
    // The rows read last are still in the L2 cache: they come first.
    for (int row = p.rows - 1 - blockIdx.x; row >= 0; row -= gridDim.x) write_row<kDiscounted>(p, t, row, mean, inverse_std);
}

}  // namespace prime
