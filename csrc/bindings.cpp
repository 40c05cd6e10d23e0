// prime_kernels._C: a unit NAME.cpp defines void bind_NAME(pybind11::module_&) and has its line here.
#include <pybind11/pybind11.h>

#define UNITS(X) \
    X(advantage) \
    X(credit) \
    X(row_kernel)

#define DECLARE(NAME) void bind_##NAME(pybind11::module_&);
#define BIND(NAME) bind_##NAME(module);

UNITS(DECLARE)

PYBIND11_MODULE(_C, module) {
    UNITS(BIND)
}
