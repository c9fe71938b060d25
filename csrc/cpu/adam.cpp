// Adam and AdamW from the backup or in place (the decay's form is a value of the group):
// d = +-clip (a g + b v) + weight_decay w;  m = beta1 m + (1 - beta1) d;  v = beta2 v + (1 - beta2) d^2;
// w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
// Bytes a parameter, fp32: reads w 4, g 4, m 4, v 4, writes w 4, m 4, v 4; amsgrad 8 more, a direction 4
// more. Of a half type with its master: reads that 4 and g 2, writes both, 6.
#include "descend.h"

namespace sharpkern::cpu {
namespace {

template <bool kMax, class T, class W, class Gradient>
SK_CLONES void update(
    T* w, W* from, Gradient g, arithmetic_t<T>* m, arithmetic_t<T>* v, arithmetic_t<T>* vmax, int64_t n,
    bool stream, const AdamCoefficients<arithmetic_t<T>>& coefficients) {
  using A = arithmetic_t<T>;
  const auto c = coefficients;
  update_elements(w, from, g, n, stream, [&](int64_t j, A x, A d) __attribute__((always_inline)) {
    A first = m[j];
    A second = v[j];
    A largest = 0;
    if constexpr (kMax) {
      largest = vmax[j];
    }
    const A next = adam<kMax>(x, d, first, second, largest, c);
    m[j] = first;
    v[j] = second;
    if constexpr (kMax) {
      vmax[j] = largest;
    }
    return next;
  });
}

void adam_step(
    Tensors params, Tensor exp_avg, Tensor exp_avg_sq, Tensor max_exp_avg_sq, Tensor step, Tensor counters,
    Tensors grads, Tensor backup, Tensor direction, Tensor table, Tensor, Tensor group_values, Tensor sq,
    Tensor coefficients, double max_norm, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(group_values, rows, kAdamValues, "values");
  const Descent descent(
      rows, step, counters, backup, direction, coefficients, Norms(sq), max_norm, skip_nonfinite);
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    A* m = buffer<A>(exp_avg, state_dtype(dtype), rows.extent(), "exp_avg");
    A* v = buffer<A>(exp_avg_sq, state_dtype(dtype), rows.extent(), "exp_avg_sq");
    A* vmax = buffer<A>(max_exp_avg_sq, state_dtype(dtype), rows.extent(), "max_exp_avg_sq");
    for (const Row& row : rows) {
      STD_TORCH_CHECK((m != nullptr && v != nullptr) || row.numel == 0, "sharpkern: exp_avg is empty");
      STD_TORCH_CHECK(
          vmax != nullptr || groups[row.group * kAdamValues + kAdamAmsgrad] == 0 || row.numel == 0,
          "sharpkern: max_exp_avg_sq is empty");
    }
    const Coefficients<AdamCoefficients<A>> of_row(rows, step, [&](int64_t group, float t) {
      return adam_coefficients<A>(groups + group * kAdamValues, static_cast<double>(t) + 1, descent.scale);
    });
    descent.run<T, W>(
        dtype,
        [&](int64_t i, T* w, auto* from, auto g, int64_t slot, int64_t n, bool stream) {
          if (groups[rows[i].group * kAdamValues + kAdamAmsgrad] != 0) {
            update<true>(w, from, g, m + slot, v + slot, vmax + slot, n, stream, of_row[i]);
          } else {
            update<false>(w, from, g, m + slot, v + slot, nullptr, n, stream, of_row[i]);
          }
        },
        [](int64_t) { return true; });
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("adam", TORCH_BOX(&sharpkern::cpu::adam_step)); }
