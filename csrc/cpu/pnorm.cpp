// The ball of a p-norm, q = p / (p - 1): the largest magnitude m beside the squared norm (norm_max), then
// sq = sum (|g| / m)^q  (norm_p), then  backup = w;  w += s sign(g) (|g| / m)^(q - 1)  (ascend_p) with
// s = rho (m / (||g||_q + eps))^(q - 1),  ||g||_q = m sq^(1/q).
// Bytes a parameter, fp32: the norms read g 4; ascend_p reads w 4 and g 4, writes w 4 and backup 4; of a
// half type with its master it reads that 4 and g 2, and writes w 2.
#include "../pnorm.h"
#include "reduce.h"

namespace sharpkern::cpu {
namespace {

template <class T>
SK_CLONES void add_squares_and_max(Sums<T>* sums, const T* g, int64_t n) {
  using A = arithmetic_t<T>;
  for_sums(0, n, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const A x = static_cast<A>(g[i]);
    const A a = x < 0 ? -x : x;
    sums[0][j] += x * x;
    sums[1][j] = a > sums[1][j] ? a : sums[1][j];
  });
}

template <class T>
SK_CLONES void add_powers(
    Sums<T>& sums, const T* g, int64_t n, Peak<arithmetic_t<T>> peak, arithmetic_t<T> q) {
  using A = arithmetic_t<T>;
  for_sums(0, n, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    sums[j] += peak.large_power(static_cast<A>(g[i]), q);
  });
}

template <class T, class W, bool kSign>
SK_CLONES void move(
    T* w, W* backup, const T* g, int64_t n, arithmetic_t<T> s, Peak<arithmetic_t<T>> peak, arithmetic_t<T> y,
    bool stream) {
  using A = arithmetic_t<T>;
  const auto burst = [&](int64_t i, int64_t count, T* next, W* kept) __attribute__((always_inline)) {
    alignas(64) A x[kBurst];
    alignas(64) A d[kBurst];
    if constexpr (kIsMaster<T, W>) {
      convert(backup + i, x, count);
    } else {
      copy(w + i, kept, count);
      convert(w + i, x, count);
    }
    convert(g + i, d, count);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      x[j] = ascend_p<kSign>(x[j], d[j], s, peak, y);
    }
    convert(x, next, count);
  };
  int64_t i = 0;
  for (; i + kBurst <= n; i += kBurst) {
    if (stream) {
      if constexpr (kIsMaster<T, W>) {
        alignas(64) T next[kBurst];
        burst(i, kBurst, next, nullptr);
        stream_burst(w + i, next);
      } else {
        alignas(64) T kept[kBurst];
        burst(i, kBurst, w + i, kept);
        stream_burst(backup + i, kept);
      }
    } else {
      burst(i, kBurst, w + i, backup + i);
    }
  }
  if (stream) {
    stream_end();
  }
  burst(i, n - i, w + i, backup + i);
}

void norm_max(
    Tensor sq, Tensor largest, Tensor partials, Tensor ema, Tensors grads, Tensor table, Tensor,
    int64_t index, double decay, double coefficient, ScalarType dtype) {
  check_no_lists(grads);
  const Rows rows(table);
  const NormOutput output(sq, ema, index, decay, coefficient);
  double* maxima = maxima_beside(output, largest);
  const Reduction<2, true> reduction(rows, partials);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t, int64_t n) {
      if (rows[i].grad != 0) {
        add_squares_and_max(sums, at<T>(rows[i].grad, offset), n);
      }
    };
    const auto totals = reduction.template run<T>(add);
    maxima[index] = totals[1];
    output.write(totals[0]);
  });
}

void norm_p(
    Tensor sq, Tensor partials, Tensors grads, Tensor table, Tensor, Tensor largest, double q,
    ScalarType dtype) {
  check_no_lists(grads);
  const Rows rows(table);
  double* output = element(sq);
  const double m = largest_of(vector(largest, "largest"), largest.numel());
  const Reduction<1> reduction(rows, partials);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const Peak<A> peak(m);
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t, int64_t n) {
      if (rows[i].grad != 0) {
        add_powers<T>(*sums, at<T>(rows[i].grad, offset), n, peak, static_cast<A>(q));
      }
    };
    *output = reduction.template run<T>(add)[0];
  });
}

void ascend_p(
    Tensors params, Tensor backup, Tensor counters, Tensors grads, Tensor table, Tensor, Tensor radius,
    Tensor sq, Tensor largest, Tensor powers, double exponent, double eps, bool skip_nonfinite,
    ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  const double* groups = values(radius, rows, 2, "radius");
  const bool skip = skip_nonfinite && !Norms(sq).finite;
  const DualNorm norm(largest, powers, exponent, eps);
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    W* kept = buffer<W>(backup, weights_dtype(backup, dtype), rows.extent(), "backup");
    STD_TORCH_CHECK(kept != nullptr || rows.extent() == 0, "sharpkern: backup is empty");
    const Peak<A> peak(norm.largest());
    const double scale = norm.scale();
    const bool around = stream<T>(rows);
    walk_parallel(rows, [&](int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      if (row.grad == 0) {
        return;
      }
      T* w = at<T>(row.param, offset);
      W* to = kept + slot;
      if (skip) {
        if constexpr (!kIsMaster<T, W>) {
          std::copy(w, w + n, to);
        }
        return;
      }
      const auto move_all = exponent == 0 ? move<T, W, true> : move<T, W, false>;
      move_all(
          w, to, at<T>(row.grad, offset), n, static_cast<A>(groups[2 * row.group] * scale), peak,
          static_cast<A>(exponent), around && (kIsMaster<T, W> ? streamable(w) : streamable(to)));
    });
  });
  auto* marks = static_cast<Row*>(table.mutable_data_ptr());
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (rows[i].grad != 0) {
      marks[i].backup = 1;
    }
  }
  if (count != nullptr) {
    count[0] += 1;
    count[1] += 1;
  }
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("norm_max", TORCH_BOX(&sharpkern::cpu::norm_max));
  m.impl("norm_p", TORCH_BOX(&sharpkern::cpu::norm_p));
  m.impl("ascend_p", TORCH_BOX(&sharpkern::cpu::ascend_p));
}
