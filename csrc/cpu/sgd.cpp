// SGD from the backup or in place:  d = +-clip (a g + b v) + weight_decay w;
// buf = momentum buf + (1 - dampening) d;  w -= lr (nesterov ? d + momentum buf : buf).
// Bytes a parameter, fp32: reads w 4, g 4, buf 4, writes w 4, buf 4; without momentum 12; with a direction v
// 4 more. Of a half type with its master: reads that 4 and g 2, writes both, 6.
#include "descend.h"

namespace sharpkern::cpu {
namespace {

template <bool kMomentumBuffer, class T, class W, class Gradient>
SK_CLONES void update(
    T* w, W* from, Gradient g, arithmetic_t<T>* buf, int64_t n, bool stream,
    const SgdCoefficients<arithmetic_t<T>>& coefficients) {
  using A = arithmetic_t<T>;
  const auto c = coefficients;
  update_elements(w, from, g, n, stream, [&](int64_t j, A x, A d) __attribute__((always_inline)) {
    if constexpr (kMomentumBuffer) {
      A b = buf[j];
      const A next = sgd_momentum(x, d, b, c);
      buf[j] = b;
      return next;
    } else {
      return sgd_plain(x, d, c);
    }
  });
}

void sgd(
    Tensors params, Tensor momentum_buffer, Tensor step, Tensor counters, Tensors grads, Tensor backup,
    Tensor direction, Tensor table, Tensor, Tensor group_values, Tensor sq, Tensor coefficients,
    double max_norm, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(group_values, rows, kSgdValues, "values");
  const Descent descent(
      rows, step, counters, backup, direction, coefficients, Norms(sq), max_norm, skip_nonfinite);
  const auto momentum = [&](int64_t i) { return groups[rows[i].group * kSgdValues + kSgdMomentum]; };
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    A* buf = buffer<A>(momentum_buffer, state_dtype(dtype), rows.extent(), "momentum_buffer");
    for (int64_t i = 0; i < rows.size(); ++i) {
      STD_TORCH_CHECK(
          buf != nullptr || momentum(i) == 0 || rows[i].numel == 0, "sharpkern: momentum_buffer is empty");
    }
    const Coefficients<SgdCoefficients<A>> of_row(rows, step, [&](int64_t group, float t) {
      return sgd_coefficients<A>(groups + group * kSgdValues, t == 0, descent.scale);
    });
    descent.run<T, W>(
        dtype,
        [&](int64_t i, T* w, auto* from, auto g, int64_t slot, int64_t n, bool stream) {
          if (momentum(i) != 0) {
            update<true>(w, from, g, buf + slot, n, stream, of_row[i]);
          } else {
            update<false>(w, from, g, nullptr, n, stream, of_row[i]);
          }
        },
        [&](int64_t i) { return momentum(i) != 0; });
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("sgd", TORCH_BOX(&sharpkern::cpu::sgd)); }
