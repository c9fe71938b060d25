// What every base rule shares: from where it steps, along which gradient, whether it steps at all, and who
// counts.
#pragma once

#include "walk.h"

namespace sharpkern::cpu {

// g, the gradient of the pass.
template <class T>
struct Plain {
  const T* g;
  SK_INLINE arithmetic_t<T> operator[](int64_t i) const { return static_cast<arithmetic_t<T>>(g[i]); }
  SK_INLINE void read(int64_t i, arithmetic_t<T>* to, int64_t n) const { convert(g + i, to, n); }
};

// a g + b v, with v of the parameters' or of the state's dtype: as many bytes more.
template <class T, class V>
struct Mixed {
  using A = arithmetic_t<T>;
  const T* g;
  const V* v;
  A a;
  A b;
  SK_INLINE A operator[](int64_t i) const {
    return combined(static_cast<A>(g[i]), static_cast<A>(v[i]), a, b);
  }
  SK_INLINE void read(int64_t i, A* to, int64_t n) const {
    alignas(64) A along[kBurst];
    convert(g + i, to, n);
    convert(v + i, along, n);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      to[j] = combined(to[j], along[j], a, b);
    }
  }
};

// What a rule computes with: compute(group, step) for each row, once for rows that have these in common and
// follow one another. In memory long before a kernel reads it: what was just stored would be waited for.
template <class C>
class Coefficients {
 public:
  template <class Compute>
  Coefficients(const Rows& rows, const Tensor& step, Compute&& compute) : places_(rows.size()) {
    const float* steps = buffer<float>(step, ScalarType::Float, rows.size(), "step");
    STD_TORCH_CHECK(steps != nullptr || rows.size() == 0, "sharpkern: step is empty");
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (i == 0 || rows[i].group != rows[i - 1].group || steps[i] != steps[i - 1]) {
        values_.push_back(compute(rows[i].group, steps[i]));
      }
      places_[i] = static_cast<int32_t>(values_.size()) - 1;
    }
  }

  const C& operator[](int64_t row) const { return values_[places_[row]]; }

 private:
  std::vector<C> values_;
  std::vector<int32_t> places_;
};

// The arguments that every rule takes after its own state.
struct Descent {
  const Rows& rows;
  const Tensor& counters;
  const Tensor* backup;     // empty: every row steps in place
  const char* name;         // of that, in errors
  const bool in_place;      // whether marks of backups count for nothing
  const Tensor* direction;  // null: none
  const Tensor& step;
  const double* coefficients;  // [a, b]; null: 1 and 0
  const bool skip;
  const double scale;  // of the gradient that update() gets: clip, or clip a without a direction

  Descent(
      const Rows& rows, const Tensor& step, const Tensor& counters, const Tensor& backup,
      const Tensor& direction, const Tensor& coefficients, const Norms& norms, double max_norm,
      bool skip_nonfinite)
      : rows(rows),
        counters(counters),
        backup(&backup),
        name("backup"),
        in_place(false),
        direction(direction.numel() == 0 ? nullptr : &direction),
        step(step),
        coefficients(direction_coefficients(coefficients, direction)),
        skip(skip_nonfinite && !norms.finite),
        scale(
            clip_factor(norms.last, max_norm) *
            (this->coefficients != nullptr && direction.numel() == 0 ? this->coefficients[0] : 1)) {}

  // In place, or from the master, along the clipped gradient.
  Descent(
      const Rows& rows, const Tensor& step, const Tensor& counters, const Tensor& master, const Norms& norms,
      double max_norm, bool skip_nonfinite)
      : rows(rows),
        counters(counters),
        backup(&master),
        name("master"),
        in_place(true),
        direction(nullptr),
        step(step),
        coefficients(nullptr),
        skip(skip_nonfinite && !norms.finite),
        scale(clip_factor(norms.last, max_norm)) {}

  // update(row index, weights, from, gradient, slot, length, stream) for each piece that has a
  // gradient, which is Plain or Mixed; the backup goes back where there is none, or where the step is
  // skipped. `from` are constant weights, or a master, which is of W and not. Afterwards counts(row index)
  // says whose step counter advances.
  template <class T, class W, class Update, class Counts>
  void run(ScalarType dtype, Update&& update, Counts&& counts) const {
    using A = arithmetic_t<T>;
    if (direction == nullptr) {
      run_plain<T, W>(dtype, update, counts);
    } else if (direction->scalar_type() == dtype) {
      run_along<T, W>(dtype, mixed_with<T, T>(dtype), update, counts);
    } else if constexpr (!std::is_same_v<T, A>) {
      run_along<T, W>(dtype, mixed_with<T, A>(state_dtype(dtype)), update, counts);
    } else {
      mixed_with<T, T>(dtype);  // says what the dtype should be
    }
  }

  // Without a direction: the gradient is Plain.
  template <class T, class W, class Update, class Counts>
  void run_plain(ScalarType dtype, Update&& update, Counts&& counts) const {
    run_along<T, W>(dtype, [](const T* g, int64_t) { return Plain<T>{g}; }, update, counts);
  }

 private:
  // (g, slot) -> Mixed.
  template <class T, class V>
  auto mixed_with(ScalarType dtype) const {
    using A = arithmetic_t<T>;
    const V* v = buffer<V>(*direction, dtype, rows.extent(), "direction");
    return [v, a = static_cast<A>(coefficients[0]), b = static_cast<A>(coefficients[1])](
               const T* g, int64_t slot) { return Mixed<T, V>{g, v + slot, a, b}; };
  }

  template <class T, class W, class Along, class Update, class Counts>
  void run_along(ScalarType dtype, Along&& along, Update&& update, Counts&& counts) const {
    float* steps = buffer<float>(step, ScalarType::Float, rows.size(), "step");
    STD_TORCH_CHECK(steps != nullptr || rows.size() == 0, "sharpkern: step is empty");
    auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
    W* kept = buffer<W>(*backup, weights_dtype(*backup, dtype), rows.extent(), name);
    for (const Row& row : rows) {
      STD_TORCH_CHECK(
          in_place || row.backup == 0 || kept != nullptr || row.numel == 0, "sharpkern: backup is empty");
    }
    const bool around = stream<T>(rows);
    walk_parallel(rows, [&](int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      T* w = at<T>(row.param, offset);
      const bool backed = row.backup != 0 && kept != nullptr;
      if (row.grad == 0 || skip) {
        if (backed) {
          put_back(w, kept + slot, n);
        }
        return;
      }
      const auto g = along(at<T>(row.grad, offset), slot);
      if constexpr (kIsMaster<T, W>) {
        update(i, w, kept + slot, g, slot, n, around && streamable(w));
      } else {
        // Weights that are read where they are written come through the cache anyway.
        const T* from = backed ? kept + slot : w;
        update(i, w, from, g, slot, n, around && from != w && streamable(w));
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

// w[j] = f(j, from[j], g[j]) with the result widened and rounded; w streamed when asked. A master takes the
// result as it is.
template <class T, class W, class Gradient, class F>
SK_INLINE void update_elements(T* w, W* from, Gradient g, int64_t n, bool stream, F&& step) {
  using A = arithmetic_t<T>;
  const auto f = [&](int64_t j, A x, A d) __attribute__((always_inline)) {
    const A next = step(j, x, d);
    if constexpr (!std::is_const_v<W>) {
      from[j] = next;
    }
    return next;
  };
  if constexpr (!std::is_same_v<T, A>) {
    for_bursts(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      alignas(64) A x[kBurst];
      alignas(64) A d[kBurst];
      convert(from + i, x, m);
      g.read(i, d, m);
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        x[j] = f(i + j, x[j], d[j]);
      }
      if (stream && m == kBurst) {
        alignas(64) T next[kBurst];
        convert(x, next, kBurst);
        stream_burst(w + i, next);
      } else {
        convert(x, w + i, m);
      }
    });
    if (stream) {
      stream_end();
    }
    return;
  }
  int64_t i = 0;
  if (stream) {
    for (; i + kBurst <= n; i += kBurst) {
      alignas(64) T next[kBurst];
#pragma omp simd
      for (int64_t j = 0; j < kBurst; ++j) {
        next[j] = static_cast<T>(f(i + j, static_cast<A>(from[i + j]), g[i + j]));
      }
      stream_burst(w + i, next);
    }
    stream_end();
  }
#pragma omp simd
  for (int64_t j = i; j < n; ++j) {
    w[j] = static_cast<T>(f(j, static_cast<A>(from[j]), g[j]));
  }
}

}  // namespace sharpkern::cpu
