// Squared norm of the gradient of one flat buffer:  sq[buffer] = sum_i (T_i g_i)^2,  T = 1 (norm) or
// |w| + eta (norm_scaled); then AE-SAM's statistics of sum(sq), where they are kept.
// Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a chunk.
#include "reduce.h"

namespace sharpkern::cpu {
namespace {

template <class T, class W, bool kScaled>
SK_INLINE arithmetic_t<T> squared(W w, T g, arithmetic_t<T> eta) {
  using A = arithmetic_t<T>;
  A a = static_cast<A>(g);
  if constexpr (kScaled) {
    a *= adaptive_scale(static_cast<A>(w), eta);
  }
  return a * a;
}

template <class T, class W, bool kScaled>
SK_CLONES void add_squares(Sums<T>& sums, const W* w, const T* g, int64_t n, arithmetic_t<T> eta) {
  for_sums(0, n, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    sums[j] += squared<T, W, kScaled>(kScaled ? w[i] : W(0), g[i], eta);
  });
}

// radius: null where T = 1.
double squared_norm(
    const Rows& rows, const Tensor& partials, const Tensor* master, const double* radius, ScalarType dtype) {
  const Reduction<1> reduction(rows, partials);
  double total = 0;
  const ScalarType of_weights = master != nullptr ? weights_dtype(*master, dtype) : dtype;
  visit_weights(dtype, of_weights, [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    const W* weights = kIsMaster<T, W> ? buffer<W>(*master, of_weights, rows.extent(), "master") : nullptr;
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      const bool scaled = radius != nullptr;
      if (row.grad == 0 || (scaled && row.scale == kLeftOut)) {
        return;
      }
      const T* g = at<T>(row.grad, offset);
      if (scaled && row.scale == kMagnitude) {
        const W* w = kIsMaster<T, W> ? weights + slot : at<W>(row.param, offset);
        add_squares<T, W, true>(*sums, w, g, n, radius[2 * row.group + 1]);
      } else {
        add_squares<T, W, false>(*sums, nullptr, g, n, 0);
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
  output.write(squared_norm(rows, partials, nullptr, nullptr, dtype));
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensor ema, Tensors params, Tensor master, Tensors grads, Tensor table,
    Tensor, Tensor radius, int64_t index, double decay, double coefficient, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(radius, rows, 2, "radius");
  check_master(master, dtype);
  const NormOutput output(sq, ema, index, decay, coefficient);
  output.write(squared_norm(rows, partials, &master, groups, dtype));
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cpu::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cpu::norm_scaled));
}
