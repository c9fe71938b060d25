// The coefficients of a rule's gradient a g + b v, of two sums over the flat buffers x and y:
// [a, b] = constant + slope q,  q = x / y  or  sqrt(x) / sqrt(y),  0 where sqrt(y) is next to nothing.
// Bytes: 8 a flat buffer and sum.
#include "../common.h"

namespace sharpkern::cpu {
namespace {

void mix(
    Tensor coefficients, Tensor numerator, Tensor denominator, std::vector<double> constant,
    std::vector<double> slope, bool root) {
  Mixture(coefficients, numerator, denominator, constant, slope, root).write();
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("mix", TORCH_BOX(&sharpkern::cpu::mix)); }
