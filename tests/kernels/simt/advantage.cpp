// The kernels of prime_advantage on the host; the arguments are those of csrc/advantage_cuda.cpp and credit_cuda.cpp.
#include <cuda_runtime.h>

#include "advantage_groups.h"
#include "credit_kernel.h"

extern "C" void advantage(const uintptr_t* q, long long tokens, int rows, int phase, int estimator, int process,
                          int normalize, int whiten, double beta, double gamma, double outcome_gamma,
                          double process_weight, double outcome_weight, int bfloat16, int blocks, unsigned seed) {
    using namespace prime;
    Params p{(const void*)q[0], (const void*)q[1], (const float*)q[2], (const int*)q[3], (const long long*)q[4],
             (float*)q[5], (float*)q[6], (float*)q[7], (double*)q[8], (double*)q[9], (double*)q[10], (double*)q[11],
             (double*)q[12], (int*)q[13], tokens, rows, phase, estimator, bool(process), bool(normalize), bool(whiten),
             beta, gamma, outcome_gamma, process_weight, outcome_weight, {}, {}};
    prepare(p);
    blocks = std::min(blocks, rows);
    std::vector<Shared> shared(blocks);
    simt::run(blocks, kThreads, seed, [&] {
        Thread t(shared[blockIdx.x]);
        const auto sync = [] { simt::wait(simt::grid_barrier); };
        if (bfloat16)
            gamma != 1 ? run<__nv_bfloat16, true>(p, t, sync) : run<__nv_bfloat16, false>(p, t, sync);
        else
            gamma != 1 ? run<float, true>(p, t, sync) : run<float, false>(p, t, sync);
    });
}

extern "C" void credit(const uint64_t* pointers, long long tokens, int rows, int first, int last, int form, int process,
                       int whiten, const double* numbers, int bfloat16, int blocks, unsigned seed) {
    using namespace prime;
    CreditPointers addresses;
    CreditNumbers values;
    std::copy(pointers, pointers + addresses.size(), addresses.begin());
    std::copy(numbers, numbers + values.size(), values.begin());
    CreditParams p = credit_params(addresses, tokens, rows, first, last, form, process, whiten, values);
    prepare(p);
    blocks = std::min(blocks, rows);
    std::vector<Shared> shared(blocks);
    simt::run(blocks, kThreads, seed, [&] {
        Thread t(shared[blockIdx.x]);
        const auto sync = [] { simt::wait(simt::grid_barrier); };
        bfloat16 ? run_credit<__nv_bfloat16>(p, t, sync) : run_credit<float>(p, t, sync);
    });
}
