// The binding of prime_advantage on CUDA: pointers, sizes and the stream as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "advantage_params.h"

namespace {

// in: prm, ref, outcome, cu_seqlens, group; out: advantage, reward, score, sums, coefficients, moments, peaks, totals,
// status. The current device is the tensors'.
void advantage(std::array<uintptr_t, 14> pointers, long long tokens, int rows, int phase, int estimator, bool process,
               bool normalize, bool whiten, double beta, double gamma, double outcome_gamma, double process_weight,
               double outcome_weight, bool bfloat16, uintptr_t stream) {
    const auto as = [&](int i, auto* type) { return reinterpret_cast<decltype(type)>(pointers[i]); };
    prime::Params p{};
    p.prm = as(0, (const void*)nullptr);
    p.ref = as(1, (const void*)nullptr);
    p.outcome = as(2, (const float*)nullptr);
    p.offsets = as(3, (const int*)nullptr);
    p.group = as(4, (const long long*)nullptr);
    p.advantage = as(5, (float*)nullptr);
    p.reward = as(6, (float*)nullptr);
    p.score = as(7, (float*)nullptr);
    p.sums = as(8, (double*)nullptr);
    p.coefficients = as(9, (double*)nullptr);
    p.moments = as(10, (double*)nullptr);
    p.peaks = as(11, (double*)nullptr);
    p.totals = as(12, (double*)nullptr);
    p.status = as(13, (int*)nullptr);
    p.tokens = tokens;
    p.rows = rows;
    p.phase = phase;
    p.estimator = estimator;
    p.process = process;
    p.normalize = normalize;
    p.whiten = whiten;
    p.beta = beta;
    p.gamma = gamma;
    p.outcome_gamma = outcome_gamma;
    p.process_weight = process_weight;
    p.outcome_weight = outcome_weight;
    const std::string error = prime::launch(p, bfloat16, reinterpret_cast<void*>(stream));
    if (!error.empty()) throw std::runtime_error("prime_advantage: CUDA: " + error);
}

}  // namespace

void bind_advantage(pybind11::module_& module) { module.def("advantage", &advantage); }
