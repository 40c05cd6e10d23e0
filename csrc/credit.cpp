// The credit forms of prime_advantage on the CPU, in the stages of credit_params.h.
//
// A row is walked in blocks of kBlock tokens or steps from its own start, or end, so that nothing depends on where it is
// packed; sums over rows are exact, so that the order of rows and threads leaves no trace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "cpu_rows.h"
#include "credit_math.h"

namespace {

using namespace prime;
using namespace prime::cpu;

struct Row {
    int64_t start, length, steps;
    Row(const CreditParams& p, int64_t i) : start(p.offsets[i]), length(p.offsets[i + 1] - start) {
        steps = p.step ? p.step[start + length - 1] + 1 : length;
    }
};

// Token rewards, score and, of each step, the sum of q up to its end. False for a bad step or reward.
template <typename T>
bool prefixes(const CreditParams& p, int64_t i) {
    const int64_t start = p.offsets[i], length = p.offsets[i + 1] - start;
    const T *prm = static_cast<const T*>(p.prm), *ref = static_cast<const T*>(p.ref);
    const double one[kLanes + 1] = {1, 1, 1, 1, 1};
    double q[kBlock + kLanes], carry = 0, total = 0;
    bool good = true;
    for (int64_t base = 0; base < length; base += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, length - base));
        for (int n = 0; n < count; ++n) {
            const int64_t t = start + base + n;
            q[n] = prm ? double(float(prm[t])) - double(float(ref[t])) : 0.;
            total += p.reward[t] = float(p.beta * q[n]);
        }
        if (p.step)
            for (int n = 0; n < count; ++n) {
                const int* at = p.step + start + base + n;
                good &= base + n ? *at == at[-1] || *at == int64_t(at[-1]) + 1 : *at == 0;
            }
        if (!p.process) continue;
        std::fill(q + count, q + count + kLanes, 0.);
        carry = scan(q, count, carry, one);
        for (int n = 0; n < count; ++n) {  // the last token of a step stays
            const int64_t step = p.step ? p.step[start + base + n] : base + n;
            if (step >= 0 && step <= base + n) p.prefix[start + step] = q[n];
        }
    }
    p.score[i] = float(total);
    return good && (!p.process || std::isfinite(total));
}

// The process term of each step; of ODDS the largest.
double terms(const CreditParams& p, int64_t i, const Fellows& fellows) {
    const Row row(p, i);
    double *prefix = p.prefix + row.start, *term = p.term + row.start, largest = 0;
    for (int64_t base = 0; p.credit != ODDS && base < row.steps; base += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, row.steps - base));
        double value[kBlock];  // not in place: how the compiler splits the loop depends on nothing but count
        std::copy(prefix + base, prefix + base + count, value);
#pragma omp simd
        for (int n = 0; n < count; ++n) value[n] = fellows.value(p, value[n], double(base + n + 1));
        std::copy(value, value + count, prefix + base);
    }
    const double start = p.credit == ODDS ? 0 : fellows.start;
    for (int64_t j = 0; j < row.steps; ++j) {
        const bool last = j == row.steps - 1;
        term[j] = term_of(p.credit, fellows, j ? prefix[j - 1] : start, prefix[j], prefix[last ? j : j + 1], last, p.outcome[i]);
        largest = std::max(largest, std::abs(term[j]));
    }
    if (p.credit == TD)
        for (int64_t j = row.steps - 2; j >= 0; --j) term[j] += p.gamma * term[j + 1];
    return largest;
}

template <typename T>
bool rows_stage(const CreditParams& p, int threads) {
    if (!ascending(p.offsets, p.rows, p.tokens)) return false;
    struct Group { Exact all{1}; int count = 0; };
    std::unordered_map<long long, Group> groups;
    bool good = true;
    for (int i = 0; i < p.rows; ++i) {
        good &= p.outcome[i] >= 0 && p.outcome[i] <= 1;
        Group& group = groups[p.group[i]];
        group.all.add(p.outcome[i]);
        ++group.count;
    }
    for (const auto& group : groups) good &= group.second.count > 1;
    if (!good) return false;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) reduction(& : good)
    for (int i = 0; i < p.rows; ++i) {
        const Group& group = groups.find(p.group[i])->second;
        const Fellows fellows(p, p.outcome[i], group.all.value(), group.count);
        p.coefficients[i] = p.outcome_weight * (p.outcome[i] - fellows.others);
        const bool fine = prefixes<T>(p, i);
        good &= fine;
        p.peaks[i] = fine && p.process ? terms(p, i, fellows) : 0;
    }
    return good;
}

// A thread takes some of the numbers that steps have, of all rows.
void index_stage(const CreditParams& p, double bound, int threads) {
    int64_t most = 0;
    for (int i = 0; i < p.rows; ++i) most = std::max(most, Row(p, i).steps);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t base = 0; base < most; base += kBlock) {
        const int64_t end = std::min(most, base + kBlock);
        std::vector<Exact> sums(end - base, Exact(bound));
        std::fill(p.index + 2 * p.tokens + base, p.index + 2 * p.tokens + end, 0);
        for (int i = 0; i < p.rows; ++i) {
            const Row row(p, i);
            for (int64_t j = base; j < std::min(end, row.steps); ++j) {
                sums[j - base].add(p.term[row.start + j]);
                ++p.index[2 * p.tokens + j];
            }
        }
        for (int64_t j = base; j < end; ++j) {
            p.index[j] = sums[j - base].high;
            p.index[p.tokens + j] = sums[j - base].low;
        }
    }
}

void deviations_stage(const CreditParams& p, double bound, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int i = 0; i < p.rows; ++i) {
        const Row row(p, i);
        Exact sum(bound);
        double squares = 0;
        for (int64_t j = 0; j < row.steps; ++j) {
            sum.high = p.index[j], sum.low = p.index[p.tokens + j];
            double& x = p.term[row.start + j];
            x -= sum.value() / double(p.index[2 * p.tokens + j]);
            squares += x * x;
        }
        p.totals[4ll * i + 2] = squares;
        p.totals[4ll * i + 3] = double(row.steps);
    }
}

// A row's advantages before whitening, from its end on: f(tokens before the block's last one, x, count), x[0] the last.
template <typename F>
void each_block(const CreditParams& p, int64_t i, const double* powers, double spread, F f) {
    const Row row(p, i);
    double x[kBlock], outcome = p.coefficients[i];
    for (int64_t base = 0; base < row.length; base += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, row.length - base));
        const int64_t last = row.length - 1 - base;
        for (int n = 0; n < count; ++n) x[n] = outcome * powers[n];
        if (p.process)
            for (int n = 0; n < count; ++n) {
                double term = p.term[row.start + (p.step ? p.step[row.start + last - n] : last - n)];
                if (p.credit == ODDS) term = std::min(kClip, std::max(-kClip, term * spread));
                x[n] += p.process_weight * term;
            }
        f(row.start + last, x, count);
        outcome *= powers[kBlock];
    }
}

double sum_totals(const CreditParams& p, int field) {
    double most = 0;
    for (int64_t i = 0; i < p.rows; ++i) most = std::max(most, std::abs(p.totals[4 * i + field]));
    Exact sum(most);
    for (int64_t i = 0; i < p.rows; ++i) sum.add(p.totals[4 * i + field]);
    return sum.value();
}

template <typename T>
void run(const CreditParams& p, int threads) {
    const auto runs = [&](Stage stage) { return p.first <= stage && stage <= p.last; };
    const bool odds = p.process && p.credit == ODDS;
    if (runs(ROWS)) {
        p.moments[3] = rows_stage<T>(p, threads) ? *std::max_element(p.peaks, p.peaks + p.rows) : INFINITY;
        if (p.moments[3] == INFINITY) return;
    }
    const double bound = p.moments[3];
    if (odds && runs(INDEX)) index_stage(p, bound, threads);
    double spread = p.moments[2], mean = p.moments[0], inverse_std = p.moments[1];
    if (odds && runs(DEVIATIONS)) {
        deviations_stage(p, bound, threads);
        spread = 1 / (std::sqrt(sum_totals(p, 2) / sum_totals(p, 3)) + kLogRatioFloor);
    }
    double powers[kBlock + 1] = {1};
    for (int n = 0; n < kBlock; ++n) powers[n + 1] = powers[n] * p.outcome_gamma;
    if (p.whiten && runs(SUMS)) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
        for (int i = 0; i < p.rows; ++i) {
            double sum = 0, squares = 0;
            each_block(p, i, powers, spread, [&](int64_t, const double* x, int count) {
#pragma omp simd reduction(+ : sum, squares)
                for (int n = 0; n < count; ++n) {
                    sum += x[n];
                    squares += x[n] * x[n];
                }
            });
            p.totals[4ll * i] = sum;
            p.totals[4ll * i + 1] = squares;
        }
        const double sum = sum_totals(p, 0), squares = sum_totals(p, 1);
        mean = sum / p.tokens;
        inverse_std = 1 / std::sqrt(std::max(0., squares - mean * sum) / std::max(1ll, p.tokens - 1) + 1e-8);
    }
    if (!p.whiten) mean = 0, inverse_std = 1;
    if (!runs(WRITE)) return;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int i = 0; i < p.rows; ++i)
        each_block(p, i, powers, spread, [&](int64_t last, const double* x, int count) {
            for (int n = 0; n < count; ++n) p.advantage[last - n] = float((x[n] - mean) * inverse_std);
        });
}

void credit(const CreditPointers& pointers, long long tokens, int rows, int first, int last, int form, bool process,
            bool whiten, const CreditNumbers& numbers, bool bfloat16, int threads) {
    const CreditParams p = credit_params(pointers, tokens, rows, first, last, form, process, whiten, numbers);
    bfloat16 ? run<BFloat16>(p, threads) : run<float>(p, threads);
}

}  // namespace

void bind_credit(pybind11::module_& module) {
    module.def("credit", &credit, pybind11::call_guard<pybind11::gil_scoped_release>());
}
