// prime_kernels._cuda: a unit NAME_cuda.cpp defines void bind_NAME(pybind11::module_&) and has its line here.
#include <pybind11/pybind11.h>

#define UNITS(X) \
    X(advantage) \
    X(credit)

#define DECLARE(NAME) void bind_##NAME(pybind11::module_&);
#define BIND(NAME) bind_##NAME(module);

UNITS(DECLARE)

PYBIND11_MODULE(_cuda, module) {
    UNITS(BIND)
}
