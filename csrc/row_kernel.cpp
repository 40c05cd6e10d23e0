// The row kernel of the LM-head ops: logits -> log-prob and entropy of each row, and dlogits in their place.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

namespace {

struct Head {
    const float* bias;  // (vocabulary,) or null
    float temperature;
    float softcap;  // 0 for none
};

// How d loss / d logprob of a row comes about: from the policy loss if `advantage` is given, else as given.
struct Gradient {
    const float* dlogprob;  // (rows,) or null for ones
    const float* dentropy;  // (rows,) or null for zeros
    const float* advantage;
    const float* token_weight;
    const float* old_logprob;  // null on-policy
    const float* ref_logprob;       // null without a KL term
    const float* sampling_logprob;  // null without importance weights from this forward
    float importance_cap;
    float low, high;  // the clip's bounds of the ratio
    float entropy_coef, kl_coef, max_log_ratio;
};

// Eight lanes in a fixed order: a row's bits depend neither on its address nor on the number of threads.
constexpr int LANES = 8;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef double Wide __attribute__((vector_size(8 * LANES)));

constexpr float FAR_BELOW = -104.0f;  // exp of it is 0 in float, and 0 times it is 0 where 0 times -inf is not

inline Vec load(const float* at) {
    Vec x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Vec all(float x) { return Vec{} + x; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline double sum(const Wide& x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// exp of x <= 0, within 1 ulp; 0 below the smallest normal number. 2^n times a polynomial on |r| <= ln 2 / 2.
inline Vec exp(Vec x) {
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x * 1.44269504f + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first exact times n
    Vec y = all(1.98412698e-4f);
    for (float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) y = y * r + c;
    const Int power = __builtin_convertvector(n, Int) + 127;
    const Vec result = y * reinterpret_cast<const Vec&>(static_cast<const Int&>(power << 23));
    return x < -87.0f ? all(0.0f) : result;
}

// f(x) for every eight columns; the last ones are filled up with `fill`, and f may change x.
template <class F>
inline void walk(float* row, int64_t size, float fill, F f) {
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) {
        Vec x = load(row + j);
        f(x);
        std::memcpy(row + j, &x, sizeof x);
    }
    if (j < size) {
        Vec x = all(fill);
        std::memcpy(&x, row + j, sizeof(float) * (size - j));
        f(x);
        std::memcpy(row + j, &x, sizeof(float) * (size - j));
    }
}

// As walk, without writing.
template <class F>
inline void read(const float* row, int64_t size, float fill, F f) {
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) f(load(row + j));
    if (j < size) {
        Vec x = all(fill);
        std::memcpy(&x, row + j, sizeof(float) * (size - j));
        f(x);
    }
}

// The odd polynomial where 1 - exp(-2|x|) would cancel.
inline Vec tanh(Vec x) {
    const Vec square = x * x, size = x < 0 ? -x : x, decay = exp(-2 * size), large = (1 - decay) / (1 + decay);
    Vec small = all(2.18694885e-2f);
    for (float c : {-5.39682540e-2f, 1.33333333e-1f, -3.33333333e-1f, 1.0f}) small = small * square + c;
    return square < 0.04f ? small * x : (x < 0 ? -large : large);
}

// GEMM output -> logits: softcap * tanh((z + bias) / softcap) / temperature.
void transform(float* z, int64_t size, const Head& head) {
    if (head.bias)
        for (int64_t j = 0; j < size; ++j) z[j] += head.bias[j];
    if (head.softcap) walk(z, size, 0, [&](Vec& x) { x = head.softcap * tanh(x / head.softcap); });
    if (head.temperature != 1) walk(z, size, 0, [&](Vec& x) { x /= head.temperature; });
}

float highest(const float* z, int64_t size) {
    const float lowest = std::numeric_limits<float>::lowest();
    Vec m = all(lowest);
    read(z, size, lowest, [&](Vec x) { m = larger(m, x); });
    float result = m[0];
    for (int i = 1; i < LANES; ++i) result = std::max(result, m[i]);
    return result;
}

struct Sums {
    double total;     // of exp(z - peak) over all columns but the target, kept apart for the digits of 1 - p
    double weighted;  // of exp(z - peak) * (z - peak) over the same
};

template <bool WEIGHTED>
Sums sums(float* z, int64_t size, int64_t target, float peak) {
    const float kept = z[target], minus_infinity = -std::numeric_limits<float>::infinity();
    z[target] = minus_infinity;
    Wide total{}, weighted{};
    read(z, size, minus_infinity, [&](Vec x) {
        const Vec d = larger(x - peak, all(FAR_BELOW)), e = exp(d);
        total += __builtin_convertvector(e, Wide);
        if (WEIGHTED) weighted += __builtin_convertvector(e * d, Wide);
    });
    z[target] = kept;
    return {sum(total), sum(weighted)};
}

// d token loss / d logprob without the entropy term, as prime_kernels.reference has it.
double policy_gradient(const Gradient& g, int64_t i, double logprob) {
    const double advantage = g.advantage[i];
    double result = -advantage;
    if (g.old_logprob) {
        const double difference = logprob - g.old_logprob[i], limit = g.max_log_ratio;
        const double ratio = std::exp(std::clamp(difference, -limit, limit));
        result = -advantage * ratio;
        const double clipped = -advantage * std::clamp(ratio, double(g.low), double(g.high));
        if (clipped > result || std::abs(difference) > limit) result = 0;
    }
    if (g.ref_logprob) {
        const double difference = g.ref_logprob[i] - logprob;
        if (std::abs(difference) <= g.max_log_ratio) result -= g.kl_coef * std::expm1(difference);
    }
    return result;
}

// dz_j = g (1[j = target] - p_j) - h p_j (log p_j + entropy), through temperature and softcap.
void differentiate(float* z, int64_t size, int64_t target, float peak, const Head& head, double g, double h,
                   double others, double whole, double entropy) {
    if (g == 0 && h == 0) {
        std::memset(z, 0, sizeof(float) * size);
        return;
    }
    const float capped = head.softcap ? head.temperature / head.softcap : 0;
    const auto slope = [&](auto x) { return (1 - (x * capped) * (x * capped)) / head.temperature; };
    const double d_target = std::max(double(z[target]) - peak, double(FAR_BELOW)), p_target = std::exp(d_target) / whole;
    const double offset = entropy - std::log(whole);  // log p_j + entropy = (z_j - peak) + offset
    const double at_target = (g * (others / whole) - h * p_target * (d_target + offset)) * slope(double(z[target]));
    const float scale = -1 / whole, g_ = g, h_ = h, offset_ = offset;
    const bool plain = h == 0, linear = !head.softcap && head.temperature == 1;
    walk(z, size, 0, [&](Vec& x) {
        const Vec d = larger(x - peak, all(FAR_BELOW));
        Vec dz = exp(d) * scale * (plain ? all(g_) : g_ + h_ * (d + offset_));
        if (!linear) dz *= slope(x);
        x = dz;
    });
    z[target] = at_target;
}

void one_row(float* z, int64_t size, int64_t i, int64_t target, const Head& head, const Gradient* gradient,
             float* logprob, float* entropy) {
    transform(z, size, head);
    const float peak = highest(z, size);
    const Sums others = (entropy ? sums<true> : sums<false>)(z, size, target, peak);
    const double below = double(z[target]) - peak, e_target = std::exp(below), whole = others.total + e_target;
    logprob[i] = below > -1 ? 0 - std::log1p(others.total / e_target) : below - std::log(whole);
    double spread = 0;
    if (entropy) {
        const double at_target = e_target * std::max(below, double(FAR_BELOW));
        spread = std::max(std::log(whole) - (others.weighted + at_target) / whole, 0.0);
        entropy[i] = spread;
    }
    if (!gradient) return;
    double g = gradient->dlogprob ? gradient->dlogprob[i] : 1, h = gradient->dentropy ? gradient->dentropy[i] : 0;
    if (gradient->advantage) {
        double scale = gradient->token_weight[i];
        if (gradient->sampling_logprob) {
            const double limit = gradient->max_log_ratio, ratio = double(logprob[i]) - gradient->sampling_logprob[i];
            scale *= std::min(std::exp(std::clamp(ratio, -limit, limit)), double(gradient->importance_cap));
        }
        // from the float that is returned, so that equal log-probs make a ratio of exactly 1
        g = scale * policy_gradient(*gradient, i, logprob[i]);
        h = -gradient->entropy_coef * scale;
    }
    differentiate(z, size, target, peak, head, g, h, others.total, whole, spread);
}

using Address = uintptr_t;  // of a contiguous float32 (targets: int64) tensor; 0 for None

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// logits (rows, vocabulary) are used up; if differentiated they become dlogits. entropy may be null.
void row_kernel(Address logits, int64_t rows, int64_t vocabulary, Address targets, Address logprob, Address entropy,
                Address bias, float temperature, float softcap, bool differentiated, Address dlogprob,
                Address dentropy, Address advantage, Address token_weight, Address old_logprob, Address ref_logprob,
                Address sampling_logprob, float importance_cap, float low, float high, float entropy_coef, float kl_coef, float max_log_ratio, int threads) {
    const int64_t* target = at<int64_t>(targets);
    for (int64_t i = 0; i < rows; ++i)
        if (target[i] < 0 || target[i] >= vocabulary)
            throw pybind11::value_error("targets holds " + std::to_string(target[i]) + ", needs 0 <= id < " +
                                        std::to_string(vocabulary) + ": pass token ids");
    const Head head{at<float>(bias), temperature, softcap};
    const Gradient gradient{at<float>(dlogprob),         at<float>(dentropy),    at<float>(advantage),
                            at<float>(token_weight),     at<float>(old_logprob), at<float>(ref_logprob),
                            at<float>(sampling_logprob), importance_cap,         low,
                            high,                        entropy_coef,           kl_coef,
                            max_log_ratio};
    pybind11::gil_scoped_release unlocked;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        one_row(at<float>(logits) + i * vocabulary, vocabulary, i, target[i], head,
                differentiated ? &gradient : nullptr, at<float>(logprob), at<float>(entropy));
}

}  // namespace

void bind_row_kernel(pybind11::module_& module) { module.def("row_kernel", row_kernel); }
