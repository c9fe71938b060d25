// What every base rule shares: from where it steps, along which gradient, whether it steps at all, and who
// counts.
#pragma once

#include "walk.h"

namespace sharpkern::cpu {

// The gradient that a rule steps along.
template <class T>
struct Plain {
  const T* g;
  SK_INLINE arithmetic_t<T> operator[](int64_t i) const { return static_cast<arithmetic_t<T>>(g[i]); }
};

// g + factor g_v: 4 bytes a parameter more.
template <class T>
struct Mixed {
  const T* g;
  const arithmetic_t<T>* g_v;
  arithmetic_t<T> factor;
  SK_INLINE arithmetic_t<T> operator[](int64_t i) const {
    return static_cast<arithmetic_t<T>>(g[i]) + factor * g_v[i];
  }
};

// The arguments that every rule takes after its own state.
struct Descent {
  const Rows& rows;
  const Tensor& counters;
  const Tensor& backup;
  const Tensor& g_v;
  const Tensor& step;
  const Norms norms;
  const double mix;
  const double clip;
  const bool skip;

  Descent(
      const Rows& rows, const Tensor& step, const Tensor& counters, const Tensor& backup, const Tensor& g_v,
      const Tensor& sq, const Tensor& g_v_sq, double alpha, double max_norm, bool skip_nonfinite)
      : rows(rows),
        counters(counters),
        backup(backup),
        g_v(g_v),
        step(step),
        norms(sq),
        mix(g_v.numel() == 0 ? 0 : mix_factor(norms.last, norm_of(g_v_sq), alpha)),
        clip(clip_factor(norms.last, max_norm)),
        skip(skip_nonfinite && !norms.finite) {}

  static double norm_of(const Tensor& g_v_sq) {
    const double* sq = matrix(g_v_sq, 1, "g_v_sq");
    return std::sqrt(sum_of_buffers(sq, g_v_sq.size(1)));
  }

  // update(row index, weights, from, gradient, slot, length, stream) for each piece that has a
  // gradient, which is Plain or Mixed; the backup goes back where there is none, or where the step is
  // skipped. Afterwards counts(row index) says whose step counter advances.
  template <class T, class Update, class Counts>
  void run(ScalarType dtype, Update&& update, Counts&& counts) const {
    using A = arithmetic_t<T>;
    float* steps = buffer<float>(step, ScalarType::Float, rows.size(), "step");
    STD_TORCH_CHECK(steps != nullptr || rows.size() == 0, "sharpkern: step is empty");
    auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
    T* kept = buffer<T>(backup, dtype, rows.extent(), "backup");
    const A* direction = buffer<A>(g_v, state_dtype(dtype), rows.extent(), "g_v");
    const A factor = static_cast<A>(mix);
    for (const Row& row : rows) {
      STD_TORCH_CHECK(row.backup == 0 || kept != nullptr || row.numel == 0, "sharpkern: backup is empty");
    }
    const bool around = stream<T>(rows);
    walk_parallel(rows, [&](int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      T* w = at<T>(row.param, offset);
      const T* from = row.backup != 0 ? kept + slot : w;
      if (row.grad != 0 && !skip) {
        // Weights that are read where they are written come through the cache anyway.
        const bool stream = around && from != w && streamable(w);
        const T* g = at<T>(row.grad, offset);
        if (direction != nullptr) {
          update(i, w, from, Mixed<T>{g, direction + slot, factor}, slot, n, stream);
        } else {
          update(i, w, from, Plain<T>{g}, slot, n, stream);
        }
      } else if (from != w) {
        std::copy(from, from + n, w);
      }
    });
    if (skip) {
      if (count != nullptr) {
        count[2] += 1;
      }
      return;
    }
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (rows[i].grad != 0 && counts(i)) {
        steps[i] += 1;
      }
    }
  }
};

// w[j] = f(j, from[j], g[j]) with the result widened and rounded; w streamed when asked.
template <class T, class Gradient, class F>
SK_INLINE void update_elements(T* w, const T* from, Gradient g, int64_t n, bool stream, F&& f) {
  using A = arithmetic_t<T>;
  int64_t i = 0;
  if (stream) {
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) T next[kBlock];
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) {
        next[j] = static_cast<T>(f(i + j, static_cast<A>(from[i + j]), g[i + j]));
      }
      stream_block(w + i, next);
    }
    stream_end();
  }
#pragma omp simd
  for (int64_t j = i; j < n; ++j) {
    w[j] = static_cast<T>(f(j, static_cast<A>(from[j]), g[j]));
  }
}

}  // namespace sharpkern::cpu
