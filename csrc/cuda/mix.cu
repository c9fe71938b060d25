// The coefficients of a rule's gradient a g + b v, of two sums over the flat buffers x and y:
// [a, b] = constant + slope q,  q = x / y  or  sqrt(x) / sqrt(y),  0 where sqrt(y) is next to nothing.
// Bytes: 8 a flat buffer and sum. One thread.
#include "launch.h"

namespace sharpkern::cuda {
namespace {

SK_KERNEL(1)
mix_kernel(Mixture mixture) {
  wait_for_previous();
  let_next_start();
  if (threadIdx.x == 0) {
    mixture.write();
  }
}

void mix(
    Tensor coefficients, Tensor numerator, Tensor denominator, std::vector<double> constant,
    std::vector<double> slope, bool root) {
  const Device device(coefficients, "coefficients");
  device.holds({{&numerator, "numerator"}, {&denominator, "denominator"}});
  const Mixture mixture(coefficients, numerator, denominator, constant, slope, root);
  device.launch("mix", mix_kernel, 1, mixture);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("mix", TORCH_BOX(&sharpkern::cuda::mix)); }
