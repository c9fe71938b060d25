// Squared norm of the gradient of one flat buffer:  sq[buffer] = sum_i (T_i g_i)^2,  T = 1 (norm) or
// |w| + eta (norm_scaled); then AE-SAM's statistics of sum(sq), where they are kept.
// Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a chunk.
#include "reduce.h"

namespace sharpkern::cpu {
namespace {

template <class T, bool kScaled>
SK_INLINE arithmetic_t<T> squared(T w, T g, arithmetic_t<T> eta) {
  using A = arithmetic_t<T>;
  A a = static_cast<A>(g);
  if constexpr (kScaled) {
    a *= adaptive_scale(static_cast<A>(w), eta);
  }
  return a * a;
}

template <class T, bool kScaled>
SK_CLONES void add_squares(Sums<T>& sums, const T* w, const T* g, int64_t n, arithmetic_t<T> eta) {
  for_sums(0, n, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    sums[j] += squared<T, kScaled>(kScaled ? w[i] : g[i], g[i], eta);
  });
}

double squared_norm(const Rows& rows, const Tensor& partials, const double* radius, ScalarType dtype) {
  const Reduction<1> reduction(rows, partials);
  double total = 0;
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t, int64_t n) {
      const Row& row = rows[i];
      const bool scaled = radius != nullptr;
      if (row.grad == 0 || (scaled && row.scale == kLeftOut)) {
        return;
      }
      const T* g = at<T>(row.grad, offset);
      if (scaled && row.scale == kMagnitude) {
        add_squares<T, true>(*sums, at<T>(row.param, offset), g, n, radius[2 * row.group + 1]);
      } else {
        add_squares<T, false>(*sums, nullptr, g, n, 0);
      }
    };
    total = reduction.template run<T>(add)[0];
  });
  return total;
}

void norm(
    Tensor sq, Tensor partials, Tensor ema, Tensors grads, Tensor table, Tensor, int64_t index, double decay,
    double coefficient, ScalarType dtype) {
  check_no_lists(grads);
  const Rows rows(table);
  const NormOutput output(sq, ema, index, decay, coefficient);
  output.write(squared_norm(rows, partials, nullptr, dtype));
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensor ema, Tensors params, Tensors grads, Tensor table, Tensor,
    Tensor radius, int64_t index, double decay, double coefficient, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(radius, rows, 2, "radius");
  const NormOutput output(sq, ema, index, decay, coefficient);
  output.write(squared_norm(rows, partials, groups, dtype));
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cpu::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cpu::norm_scaled));
}
