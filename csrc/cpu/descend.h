// What every base rule shares: from where it steps, whether it steps at all, and who counts.
#pragma once

#include "walk.h"

namespace sharpkern::cpu {

// The arguments that every rule takes after its own state.
struct Descent {
  const Rows& rows;
  const Tensor& counters;
  const Tensor& backup;
  const Tensor& step;
  const Norms norms;
  const double clip;
  const bool skip;

  Descent(
      const Rows& rows, const Tensor& step, const Tensor& counters, const Tensor& backup, const Tensor& sq,
      double max_norm, bool skip_nonfinite)
      : rows(rows),
        counters(counters),
        backup(backup),
        step(step),
        norms(sq),
        clip(clip_factor(norms.last, max_norm)),
        skip(skip_nonfinite && !norms.finite) {}

  // update(row index, weights, from, gradient, slot, length, stream) for each piece that has a
  // gradient; the backup goes back where there is none, or where the step is skipped. Afterwards
  // counts(row index) says whose step counter advances.
  template <class T, class Update, class Counts>
  void run(ScalarType dtype, Update&& update, Counts&& counts) const {
    float* steps = buffer<float>(step, ScalarType::Float, rows.size(), "step");
    STD_TORCH_CHECK(steps != nullptr || rows.size() == 0, "sharpkern: step is empty");
    auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
    T* kept = buffer<T>(backup, dtype, rows.extent(), "backup");
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
        update(i, w, from, at<T>(row.grad, offset), slot, n, around && from != w && streamable(w));
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
template <class T, class F>
SK_INLINE void update_elements(T* w, const T* from, const T* g, int64_t n, bool stream, F&& f) {
  using A = arithmetic_t<T>;
  int64_t i = 0;
  if (stream) {
    for (; i + kBlock <= n; i += kBlock) {
      alignas(64) T next[kBlock];
#pragma omp simd
      for (int64_t j = 0; j < kBlock; ++j) {
        next[j] = static_cast<T>(f(i + j, static_cast<A>(from[i + j]), static_cast<A>(g[i + j])));
      }
      stream_block(w + i, next);
    }
    stream_end();
  }
#pragma omp simd
  for (int64_t j = i; j < n; ++j) {
    w[j] = static_cast<T>(f(j, static_cast<A>(from[j]), static_cast<A>(g[j])));
  }
}

}  // namespace sharpkern::cpu
