// The launch of prime_advantage's credit forms.
#include "cooperative.h"
#include "credit_kernel.h"

namespace prime {

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) credit_kernel(const __grid_constant__ CreditParams p) {
    __shared__ Shared shared;
    Thread t(shared);
    run_credit<T>(p, t, [] { cooperative_groups::this_grid().sync(); });
}

const char* launch_credit(CreditParams& p, bool bfloat16, void* stream) {
    prepare(p);
    return launch_blocks(bfloat16 ? (const void*)credit_kernel<__nv_bfloat16> : (const void*)credit_kernel<float>, p, stream);
}

}  // namespace prime
