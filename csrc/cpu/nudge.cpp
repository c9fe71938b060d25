// Nudged SGD, whose next momentum buffer is scaled along orthonormal directions e_k:
// along = [<the terms of buf without g, e_k>, <that of g, e_k>] and sq = ||g||^2  (nudge_dots), then
// buf = momentum buf + (1 - dampening) (+-clip g + weight_decay w);
// w -= lr (buf + (nudge - 1) sum_k <buf, e_k> e_k)  (nudge_sgd).
// Bytes a parameter, fp32, of K directions: reads w 4, g 4, buf 4 and e 4 K, each of the two; nudge_sgd
// writes w 4, buf 4. Without momentum no buf.
#include "descend.h"
#include "reduce.h"

namespace sharpkern::cpu {
namespace {

template <bool kMomentumBuffer, class T, class W>
SK_CLONES void add_products(
    Sums<T>* sums, const W* w, const T* g, const arithmetic_t<T>* buf, Directions<arithmetic_t<T>> directions,
    int64_t slot, int64_t n, const SgdCoefficients<arithmetic_t<T>>& coefficients) {
  using A = arithmetic_t<T>;
  const auto c = coefficients;
  for_bursts(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    alignas(64) A kept[kBurst];
    alignas(64) A pulled[kBurst];
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
      const A d = static_cast<A>(g[i + j]);
      kept[j] = sgd_kept(static_cast<A>(w[i + j]), kMomentumBuffer ? buf[i + j] : A(0), c);
      pulled[j] = sgd_pulled(d, c);
      sums[0][j] += d * d;
    }
    for (int64_t k = 0; k < directions.count; ++k) {
      const A* e = directions.row(k) + slot + i;
      A* without = sums[1 + 2 * k];
      A* of_gradient = sums[2 + 2 * k];
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        without[j] += kept[j] * e[j];
        of_gradient[j] += pulled[j] * e[j];
      }
    }
  });
}

template <bool kMomentumBuffer, class T, class W>
SK_CLONES void update(
    T* w, W* from, const T* g, arithmetic_t<T>* buf, Directions<arithmetic_t<T>> directions,
    const arithmetic_t<T>* factors, int64_t slot, int64_t n,
    const SgdCoefficients<arithmetic_t<T>>& coefficients) {
  using A = arithmetic_t<T>;
  const auto c = coefficients;
  for_bursts(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    alignas(64) A correction[kBurst] = {};
    for (int64_t k = 0; k < directions.count; ++k) {
      const A* e = directions.row(k) + slot + i;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        correction[j] += factors[k] * e[j];
      }
    }
    const auto step = [&](int64_t j, A x, A d) __attribute__((always_inline)) {
      A b = kMomentumBuffer ? buf[i + j] : A(0);
      const A next = nudge_sgd(x, d, b, correction[j], c);
      if constexpr (kMomentumBuffer) {
        buf[i + j] = b;
      }
      return next;
    };
    update_elements(w + i, from + i, Plain<T>{g + i}, m, false, step);
  });
}

// The momentum buffer, which has to be there for the rows that have momentum.
template <class A>
A* buffer_of_momentum(const Rows& rows, const double* groups, const Tensor& momentum, ScalarType dtype) {
  A* buf = buffer<A>(momentum, dtype, rows.extent(), "momentum_buffer");
  for (const Row& row : rows) {
    STD_TORCH_CHECK(
        buf != nullptr || groups[row.group * kNudgeValues + kSgdMomentum] == 0 || row.numel == 0,
        "sharpkern: momentum_buffer is empty");
  }
  return buf;
}

void nudge_dots(
    Tensor sq, Tensor along, Tensor partials, Tensors params, Tensor master, Tensors grads,
    Tensor momentum_buffer, Tensor step, Tensor eigenvectors, Tensor table, Tensor, Tensor group_values,
    ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(group_values, rows, kNudgeValues, "values");
  double* squared = element(sq);
  check_master(master, dtype);
  visit_weights(dtype, weights_dtype(master, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    const W* weights = buffer<W>(master, weights_dtype(master, dtype), rows.extent(), "master");
    const Directions<A> directions(eigenvectors, state_dtype(dtype), rows.extent());
    check_along(along, directions.count);
    const Reduction<1 + 2 * kMostDirections> reduction(rows, partials, 1 + 2 * directions.count);
    const A* buf = buffer_of_momentum<A>(rows, groups, momentum_buffer, state_dtype(dtype));
    const Coefficients<SgdCoefficients<A>> of_row(rows, step, [&](int64_t group, float t) {
      return nudge_coefficients<A>(groups + group * kNudgeValues, t == 0, 1);
    });
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      if (row.grad == 0) {
        return;
      }
      const W* w = kIsMaster<T, W> ? weights + slot : at<W>(row.param, offset);
      const T* g = at<T>(row.grad, offset);
      if (groups[row.group * kNudgeValues + kSgdMomentum] != 0) {
        add_products<true, T>(sums, w, g, buf + slot, directions, slot, n, of_row[i]);
      } else {
        add_products<false, T>(sums, w, g, buf, directions, slot, n, of_row[i]);
      }
    };
    const auto totals = reduction.template run<T>(add);
    *squared = totals[0];
    auto* out = static_cast<double*>(along.mutable_data_ptr());
    for (int64_t k = 0; k < 2 * directions.count; ++k) {
      out[k * along.stride(0)] = totals[1 + k];
    }
  });
}

void nudge_sgd(
    Tensors params, Tensor master, Tensor momentum_buffer, Tensor step, Tensor counters, Tensors grads,
    Tensor eigenvectors, Tensor table, Tensor, Tensor group_values, Tensor sq, Tensor along, double max_norm,
    bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(group_values, rows, kNudgeValues, "values");
  check_master(master, dtype);
  const Descent descent(rows, step, counters, master, Norms(sq), max_norm, skip_nonfinite);
  const auto momentum = [&](int64_t i) { return groups[rows[i].group * kNudgeValues + kSgdMomentum]; };
  visit_weights(dtype, weights_dtype(master, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    const Directions<A> directions(eigenvectors, state_dtype(dtype), rows.extent());
    const double* sums = matrix(along, 2 * directions.count, "along");
    A* buf = buffer_of_momentum<A>(rows, groups, momentum_buffer, state_dtype(dtype));
    const Coefficients<SgdCoefficients<A>> of_row(rows, step, [&](int64_t group, float t) {
      return nudge_coefficients<A>(groups + group * kNudgeValues, t == 0, descent.scale);
    });
    double products[kMostDirections] = {};
    for (int64_t k = 0; k < directions.count; ++k) {
      products[k] = product_along(sums, along.size(1), k, descent.scale);
    }
    descent.run_plain<T, W>(
        dtype,
        [&](int64_t i, T* w, auto* from, Plain<T> g, int64_t slot, int64_t n, bool) {
          const double* v = groups + rows[i].group * kNudgeValues;
          A factors[kMostDirections];
          for (int64_t k = 0; k < directions.count; ++k) {
            factors[k] = static_cast<A>((v[kNudge] - 1) * products[k]);
          }
          if (v[kSgdMomentum] != 0) {
            update<true>(w, from, g.g, buf + slot, directions, factors, slot, n, of_row[i]);
          } else {
            update<false>(w, from, g.g, buf, directions, factors, slot, n, of_row[i]);
          }
        },
        [&](int64_t i) { return momentum(i) != 0; });
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("nudge_dots", TORCH_BOX(&sharpkern::cpu::nudge_dots));
  m.impl("nudge_sgd", TORCH_BOX(&sharpkern::cpu::nudge_sgd));
}
