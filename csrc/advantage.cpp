// The two passes of prime_advantage over the tokens, on the CPU (prime_kernels/advantage_rows.py is what lies between them).
//
// A row is walked from its end in blocks of kBlock tokens, n = 0 being its last token, so that nothing depends on where
// the row is packed. With r the token rewards, the first pass sums what the moments of the advantages need, of
//     S_n = r_n + gamma S_{n-1},   G_n = 1 + gamma G_{n-1},   O_n = outcome_gamma^n
// and the second writes (scan of (a r + b) + c O_n - mean) * inverse_std. Sums are float64.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>

#include "cpu_rows.h"

namespace {

using namespace prime::cpu;

struct Powers {
    double gamma[kLanes + 1];                  // gamma^k
    double decay[kBlock], ones[kBlock];        // gamma^(n+1), G_n
    double outcome[kBlock], outcome_block;     // outcome_gamma^n, and of a whole block

    Powers(double discount, double outcome_discount) {
        for (int k = 0; k <= kLanes; ++k) gamma[k] = k ? gamma[k - 1] * discount : 1;
        for (int n = 0; n < kBlock; ++n) {
            decay[n] = (n ? decay[n - 1] : 1) * discount;
            ones[n] = 1 + (n ? discount * ones[n - 1] : 0);
            outcome[n] = n ? outcome[n - 1] * outcome_discount : 1;
        }
        outcome_block = outcome[kBlock - 1] * outcome_discount;
    }
};

enum Field { PEAK, TOTAL, S, SS, SG, SO, G, GG, GO, O, OO, FIELDS };

template <typename T>
bool row_sums(const T* prm, const T* ref, float* reward, int64_t length, double beta, bool process, const Powers& powers,
              double* sums) {
    double scanned[kBlock + kLanes], plain[kBlock + kLanes], ones[kBlock], outcome[kBlock];
    double carry = 0, plain_carry = 0, ones_carry = 0, outcome_carry = 1, peak = 0, total = 0;
    double s = 0, ss = 0, sg = 0, so = 0, g = 0, gg = 0, go = 0, o = 0, oo = 0;
    const bool discounted = powers.gamma[1] != 1;
    bool finite = true;
    for (int64_t start = 0; start < length; start += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, length - start));
        const int64_t last = length - 1 - start;
        for (int n = 0; n < count; ++n) {
            const float r = prm ? float(beta * (double(float(prm[last - n])) - double(float(ref[last - n])))) : 0.f;
            reward[last - n] = r;
            plain[n] = r;
        }
        for (int n = 0; n < count; ++n) total += plain[n];
        if (process) {
            finite &= std::isfinite(total);
            std::fill(plain + count, plain + count + kLanes, 0.0);
            std::copy(plain, plain + count + kLanes, scanned);
            carry = scan(scanned, count, carry, powers.gamma);
            const double* undiscounted = scanned;
            if (discounted) {
                const double one[kLanes + 1] = {1, 1, 1, 1, 1};
                plain_carry = scan(plain, count, plain_carry, one);
                undiscounted = plain;
            }
            for (int n = 0; n < count; ++n) peak = std::max(peak, std::abs(undiscounted[n]));
        } else {
            std::fill(scanned, scanned + count, 0.0);
        }
        for (int n = 0; n < count; ++n) {
            ones[n] = powers.ones[n] + powers.decay[n] * ones_carry;
            outcome[n] = powers.outcome[n] * outcome_carry;
        }
        ones_carry = ones[count - 1];
        outcome_carry *= powers.outcome_block;
#pragma omp simd reduction(+ : s, ss, sg, so, g, gg, go, o, oo)
        for (int n = 0; n < count; ++n) {
            s += scanned[n];
            ss += scanned[n] * scanned[n];
            sg += scanned[n] * ones[n];
            so += scanned[n] * outcome[n];
            g += ones[n];
            gg += ones[n] * ones[n];
            go += ones[n] * outcome[n];
            o += outcome[n];
            oo += outcome[n] * outcome[n];
        }
    }
    const double all[FIELDS] = {peak, total, s, ss, sg, so, g, gg, go, o, oo};
    std::copy(all, all + FIELDS, sums);
    return finite;
}

// prm, ref (tokens,) -> reward (tokens,), sums (FIELDS, rows). False for bad offsets or rewards that are not finite.
template <typename T>
bool sums_of_rows(uintptr_t prm, uintptr_t ref, uintptr_t offsets, uintptr_t reward, uintptr_t sums, int64_t tokens,
                  int64_t rows, double beta, double gamma, double outcome_gamma, bool process, int threads) {
    const auto* cu = reinterpret_cast<const int32_t*>(offsets);
    if (!ascending(cu, rows, tokens)) return false;
    const auto *p = reinterpret_cast<const T*>(prm), *f = reinterpret_cast<const T*>(ref);
    auto* out = reinterpret_cast<float*>(reward);
    auto* table = reinterpret_cast<double*>(sums);
    const Powers powers(gamma, outcome_gamma);
    bool finite = true;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) reduction(& : finite)
    for (int64_t i = 0; i < rows; ++i) {
        double row[FIELDS];
        const int64_t start = cu[i];
        finite &= row_sums(p ? p + start : p, f ? f + start : f, out + start, cu[i + 1] - start, beta, process, powers, row);
        for (int field = 0; field < FIELDS; ++field) table[field * rows + i] = row[field];
    }
    return finite;
}

// reward (tokens,), coefficients (3, rows): a, b, c -> advantage (tokens,)
void write_rows(uintptr_t reward, uintptr_t offsets, uintptr_t coefficients, uintptr_t advantage, int64_t rows, double gamma,
           double outcome_gamma, bool process, double mean, double inverse_std, int threads) {
    const auto* cu = reinterpret_cast<const int32_t*>(offsets);
    const auto* coefficient = reinterpret_cast<const double*>(coefficients);
    const Powers powers(gamma, outcome_gamma);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) {
        const double a = coefficient[i], b = coefficient[rows + i], c = coefficient[2 * rows + i];
        const int64_t length = cu[i + 1] - cu[i];
        const float* r = reinterpret_cast<const float*>(reward) + cu[i];
        float* out = reinterpret_cast<float*>(advantage) + cu[i];
        double x[kBlock + kLanes] = {}, carry = 0, outcome_carry = c;
        for (int64_t start = 0; start < length; start += kBlock) {
            const int count = int(std::min<int64_t>(kBlock, length - start));
            const int64_t last = length - 1 - start;
            if (process) {
                for (int n = 0; n < count; ++n) x[n] = a * r[last - n] + b;
                std::fill(x + count, x + count + kLanes, 0.0);
                carry = scan(x, count, carry, powers.gamma);
            }
            for (int n = 0; n < count; ++n)
                out[last - n] = float((x[n] + powers.outcome[n] * outcome_carry - mean) * inverse_std);
            outcome_carry *= powers.outcome_block;
        }
    }
}

}  // namespace

void bind_advantage(pybind11::module_& module) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def("advantage_sums_float32", &sums_of_rows<float>, release());
    module.def("advantage_sums_bfloat16", &sums_of_rows<BFloat16>, release());
    module.def("advantage_write", &write_rows, release());
}
