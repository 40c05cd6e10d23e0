// prime_advantage on a GPU: two passes over the tokens with the rows' arithmetic between them, in one cooperative launch.
//
// A row is walked from its end in tiles, n = 0 being its last token, so that nothing depends on where the row is packed.
// With r the token rewards, the first pass sums what the moments of the advantages need, of
//     S_n = r_n + gamma S_{n-1},   G_n = 1 + gamma G_{n-1},   O_n = outcome_gamma^n
// then each group finds its baseline and the coefficients a, b, c of its rows, and the second pass writes
// (scan of (a r + b) + c O_n - mean) * inverse_std. Sums are float64; those over rows are exact, so that the order of
// rows, warps and blocks leaves no trace.
#pragma once
#include "advantage_math.h"
#include "advantage_params.h"

namespace prime {

constexpr unsigned kAll = 0xffffffffu;

inline void prepare(Params& p) {
    const double rates[] = {p.gamma, p.outcome_gamma};
    Powers* powers[] = {&p.discount, &p.outcome_discount};
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k <= kItems; ++k) powers[i]->item[k] = power(rates[i], k).last;
        for (int k = 0; k < 5; ++k) powers[i]->scan[k] = power(rates[i], kItems << k).last;
        powers[i]->warp = power(rates[i], kWarpTile).last;
        powers[i]->tile = power(rates[i], kTile).last;
        powers[i]->ones = power(rates[i], kTile).sum;
    }
}

struct Shared {
    double reduced[FIELDS][kThreads];
    double carries[2][kWarps];
    alignas(16) float staged[kWarps][kWarpTile];
    int members[kWarps][kMembers];
    int bad;
};

struct Thread {
    Shared& shared;
    int index, lane, warp, parity = 0;

    __device__ explicit Thread(Shared& s) : shared(s), index(threadIdx.x), lane(threadIdx.x & 31), warp(threadIdx.x >> 5) {}
    __device__ int place() const { return index * kItems; }  // of the first item in a tile

    // From lanes next to each other in memory to kItems tokens next to each other in a thread, and back.
    __device__ void gather(float (&x)[kItems]) {
        __syncwarp();
        for (int k = 0; k < kItems; ++k) x[k] = shared.staged[warp][lane * kItems + k];
        __syncwarp();
    }
    __device__ void scatter(const float (&x)[kItems]) {
        for (int k = 0; k < kItems; ++k) shared.staged[warp][lane * kItems + k] = x[k];
        __syncwarp();
    }

    // x_n += rate x_{n-1} over the tile, x_{-1} = carry, which becomes the last of them. For the whole block.
    template <bool kDiscounted>
    __device__ void scan(double (&x)[kItems], double& carry, const Powers& powers, double lane_power) {
        const auto times = [](double rate, double value) { return kDiscounted ? rate * value : value; };
        for (int k = 1; k < kItems; ++k) x[k] += times(powers.item[1], x[k - 1]);
        double total = x[kItems - 1];
        for (int i = 0; i < 5; ++i) {
            const double before = __shfl_up_sync(kAll, total, 1 << i);
            if (lane >= 1 << i) total += times(powers.scan[i], before);
        }
        double before = __shfl_up_sync(kAll, total, 1);
        double* carries = shared.carries[parity ^= 1];  // two, so that one barrier a scan is enough
        if (lane == 31) carries[warp] = total;
        __syncthreads();
        double mine = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp) mine = carry;
            carry = carries[w] + times(powers.warp, carry);
        }
        before = (lane ? before : 0) + times(lane_power, mine);
        for (int k = 0; k < kItems; ++k) x[k] += times(powers.item[k + 1], before);
    }

    template <typename T, typename Op>
    __device__ static T warp_reduce(T x, Op op) {
        for (int step = 16; step; step >>= 1) x = op(x, __shfl_xor_sync(kAll, x, step));
        return x;
    }
    template <typename T, typename Op>
    __device__ T block_reduce(T x, Op op) {
        T* parts = reinterpret_cast<T*>(shared.reduced[0]);
        x = warp_reduce(x, op);
        __syncthreads();
        if (!lane) parts[warp] = x;
        __syncthreads();
        x = parts[0];
        for (int w = 1; w < kWarps; ++w) x = op(x, parts[w]);
        return x;
    }
};

struct Coefficients {
    double a, b, c;
    __device__ Coefficients(const Params& p, int row)
        : a(load(p.coefficients + row)), b(load(p.coefficients + p.rows + row)), c(load(p.coefficients + 2ll * p.rows + row)) {}
};

template <typename T>
__device__ float reward_of(const Params& p, long long token) {
    if (!p.prm) return 0;
    const float prm = to_float(stream_load(static_cast<const T*>(p.prm) + token));
    const float ref = to_float(stream_load(static_cast<const T*>(p.ref) + token));
    return float(p.beta * (double(prm) - double(ref)));
}

// Token rewards, score and sums of one row. Its offsets are in range.
template <typename T, bool kDiscounted>
__device__ void sum_row(const Params& p, Thread& t, int row) {
    const long long start = p.offsets[row], length = p.offsets[row + 1] - start, end = start + length;
    const Power at = power(p.gamma, t.place() + 1);
    const double lane_power = power(p.gamma, t.lane * kItems).last, outcome_at = power(p.outcome_gamma, t.place()).last;
    double carry = 0, plain_carry = 0, ones_carry = 0, outcome_carry = 1, peak = 0, sums[FIELDS] = {};
    for (long long base = 0; base < length; base += kTile) {
        for (int k = 0; k < kItems; ++k) {
            const long long n = base + t.warp * kWarpTile + k * 32 + t.lane;
            float r = 0;
            if (n < length) p.reward[end - 1 - n] = r = reward_of<T>(p, end - 1 - n);
            t.shared.staged[t.warp][k * 32 + t.lane] = r;
        }
        float r[kItems];
        t.gather(r);
        double x[kItems] = {};
        for (int k = 0; k < kItems; ++k) sums[TOTAL] += r[k];
        if (p.process) {
            if (kDiscounted) {
                for (int k = 0; k < kItems; ++k) x[k] = r[k];
                t.scan<false>(x, plain_carry, p.discount, 1);
                for (int k = 0; k < kItems; ++k) peak = fmax(peak, fabs(x[k]));  // past the row x stays what it was
            }
            for (int k = 0; k < kItems; ++k) x[k] = r[k];
            t.scan<kDiscounted>(x, carry, p.discount, lane_power);
            if (!kDiscounted)
                for (int k = 0; k < kItems; ++k) peak = fmax(peak, fabs(x[k]));
        }
        if (p.whiten) {
            double ones = at.sum + at.last * ones_carry, outcome = outcome_at * outcome_carry;
            for (int k = 0; k < kItems; ++k) {
                if (base + t.place() + k < length) {
                    sums[S] += x[k];
                    sums[SS] += x[k] * x[k];
                    sums[SG] += x[k] * ones;
                    sums[SO] += x[k] * outcome;
                    sums[G] += ones;
                    sums[GG] += ones * ones;
                    sums[GO] += ones * outcome;
                    sums[O] += outcome;
                    sums[OO] += outcome * outcome;
                }
                ones = 1 + p.gamma * ones;
                outcome *= p.outcome_gamma;
            }
            ones_carry = p.discount.ones + p.discount.tile * ones_carry;
            outcome_carry *= p.outcome_discount.tile;
        }
    }
    sums[PEAK] = peak;
    __syncthreads();
    for (int field = 0; field < FIELDS; ++field) t.shared.reduced[field][t.index] = sums[field];
    __syncthreads();
    for (int field = t.warp; field < FIELDS; field += kWarps) {
        double x = 0;
        for (int i = t.lane; i < kThreads; i += 32) {
            const double other = t.shared.reduced[field][i];
            x = field == PEAK ? fmax(x, other) : x + other;
        }
        x = field == PEAK ? t.warp_reduce(x, Max()) : t.warp_reduce(x, Add());
        if (t.lane) continue;
        p.sums[field * (long long)p.rows + row] = x;
        if (field == TOTAL) p.score[row] = float(x);
        if (field == TOTAL && p.process && !isfinite(x)) t.shared.bad = 1;
    }
    __syncthreads();
}

// Advantages of one row.
template <bool kDiscounted>
__device__ void write_row(const Params& p, Thread& t, int row, double mean, double inverse_std) {
    const long long start = p.offsets[row], length = p.offsets[row + 1] - start, end = start + length;
    const Coefficients row_is(p, row);
    const double a = row_is.a, b = row_is.b;
    const double lane_power = power(p.gamma, t.lane * kItems).last, outcome_at = power(p.outcome_gamma, t.place()).last;
    double carry = 0, outcome_carry = row_is.c;
    for (long long base = 0; base < length; base += kTile) {
        double x[kItems] = {};
        float r[kItems];
        if (p.process) {
            for (int k = 0; k < kItems; ++k) {
                const long long n = base + t.warp * kWarpTile + k * 32 + t.lane;
                t.shared.staged[t.warp][k * 32 + t.lane] = n < length ? load(p.reward + end - 1 - n) : 0;
            }
            t.gather(r);
            for (int k = 0; k < kItems; ++k) x[k] = a * r[k] + b;
            t.scan<kDiscounted>(x, carry, p.discount, lane_power);
        }
        double outcome = outcome_at * outcome_carry;
        for (int k = 0; k < kItems; ++k) {
            r[k] = float((x[k] + outcome - mean) * inverse_std);
            outcome *= p.outcome_gamma;
        }
        outcome_carry *= p.outcome_discount.tile;
        t.scatter(r);
        for (int k = 0; k < kItems; ++k) {
            const long long n = base + t.warp * kWarpTile + k * 32 + t.lane;
            if (n < length) stream_store(p.advantage + end - 1 - n, t.shared.staged[t.warp][k * 32 + t.lane]);
        }
        __syncwarp();
    }
}

}  // namespace prime
