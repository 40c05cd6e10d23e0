// The launch of prime_advantage.
#include "advantage_groups.h"
#include "cooperative.h"

namespace prime {

template <typename T, bool kDiscounted>
__global__ void __launch_bounds__(kThreads, 3) advantage_kernel(const __grid_constant__ Params p) {
    __shared__ Shared shared;
    Thread t(shared);
    run<T, kDiscounted>(p, t, [] { cooperative_groups::this_grid().sync(); });
}

template <typename T>
const void* kernel(bool discounted) {
    return discounted ? (const void*)advantage_kernel<T, true> : (const void*)advantage_kernel<T, false>;
}

const char* launch(Params& p, bool bfloat16, void* stream) {
    prepare(p);
    const void* function = bfloat16 ? kernel<__nv_bfloat16>(p.gamma != 1) : kernel<float>(p.gamma != 1);
    return launch_blocks(function, p, stream);
}

}  // namespace prime
