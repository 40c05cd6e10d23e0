// The binding of prime_advantage's credit forms on CUDA. The current device is the tensors'.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "credit_params.h"

namespace {

void credit(const prime::CreditPointers& pointers, long long tokens, int rows, int first, int last, int form, bool process,
            bool whiten, const prime::CreditNumbers& numbers, bool bfloat16, uintptr_t stream) {
    prime::CreditParams p = prime::credit_params(pointers, tokens, rows, first, last, form, process, whiten, numbers);
    const std::string error = prime::launch_credit(p, bfloat16, reinterpret_cast<void*>(stream));
    if (!error.empty()) throw std::runtime_error("prime_advantage: CUDA: " + error);
}

}  // namespace

void bind_credit(pybind11::module_& module) { module.def("credit", &credit); }
