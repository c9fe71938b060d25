// Perturbation with backup:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
// s = rho / (norm + eps), rho signed by maximize. ascend may also keep the gradient, or move w in place.
// Bytes a parameter, fp32: reads w 4 and g 4, writes w 4, backup 4 and the kept gradient 4; of a half type
// with its master: reads that 4 and g 2, writes w 2.
#include "walk.h"

namespace sharpkern::cpu {
namespace {

template <class T, class W, bool kScaled>
SK_INLINE T perturbed(W w, T g, arithmetic_t<T> s, arithmetic_t<T> eta) {
  using A = arithmetic_t<T>;
  const A x = static_cast<A>(w);
  const A d = static_cast<A>(g);
  if constexpr (kScaled) {
    return static_cast<T>(ascend_scaled(x, d, s, eta));
  } else {
    return static_cast<T>(ascend(x, d, s));
  }
}

// Of weights that a master has:  w = backup + s g.
template <class T, class W, bool kScaled, bool kGradient>
SK_CLONES void move_from_master(
    T* w, const W* master, T* gradient, const T* g, int64_t n, arithmetic_t<T> s, arithmetic_t<T> eta,
    bool stream) {
  int64_t i = 0;
  if (stream) {
    for (; i + kBurst <= n; i += kBurst) {
      alignas(64) T next[kBurst];
      alignas(64) T kept_g[kBurst];
#pragma omp simd
      for (int64_t j = 0; j < kBurst; ++j) {
        kept_g[j] = g[i + j];
        next[j] = perturbed<T, W, kScaled>(master[i + j], kept_g[j], s, eta);
      }
      stream_burst(w + i, next);
      if constexpr (kGradient) {
        stream_burst(gradient + i, kept_g);
      }
    }
    stream_end();
  }
#pragma omp simd
  for (int64_t j = i; j < n; ++j) {
    if constexpr (kGradient) {
      gradient[j] = g[j];
    }
    w[j] = perturbed<T, W, kScaled>(master[j], g[j], s, eta);
  }
}

template <class T, bool kScaled, bool kBackup, bool kGradient>
SK_CLONES void move(
    T* w, T* backup, T* gradient, const T* g, int64_t n, arithmetic_t<T> s, arithmetic_t<T> eta,
    bool stream) {
  int64_t i = 0;
  if (stream) {
    for (; i + kBurst <= n; i += kBurst) {
      alignas(64) T kept[kBurst];
      alignas(64) T kept_g[kBurst];
#pragma omp simd
      for (int64_t j = 0; j < kBurst; ++j) {
        kept[j] = w[i + j];
        kept_g[j] = g[i + j];
        w[i + j] = perturbed<T, T, kScaled>(kept[j], kept_g[j], s, eta);
      }
      if constexpr (kBackup) {
        stream_burst(backup + i, kept);
      }
      if constexpr (kGradient) {
        stream_burst(gradient + i, kept_g);
      }
    }
    stream_end();
  }
#pragma omp simd
  for (int64_t j = i; j < n; ++j) {
    if constexpr (kBackup) {
      backup[j] = w[j];
    }
    if constexpr (kGradient) {
      gradient[j] = g[j];
    }
    w[j] = perturbed<T, T, kScaled>(w[j], g[j], s, eta);
  }
}

bool moves(const Row& row, bool scaled) { return row.grad != 0 && !(scaled && row.scale == kLeftOut); }

void run(
    const Rows& rows, const Tensor& backup, const Tensor* gradient, const Tensor& counters,
    const Tensor& table, const double* radius, const Tensor& sq, bool scaled, double eps, bool skip_nonfinite,
    ScalarType dtype) {
  const Norms norms(sq);
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  const bool skip = skip_nonfinite && !norms.finite;
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    W* kept = buffer<W>(backup, weights_dtype(backup, dtype), rows.extent(), "backup");
    T* kept_g = gradient != nullptr ? buffer<T>(*gradient, dtype, rows.extent(), "gradient") : nullptr;
    STD_TORCH_CHECK(kept != nullptr || !scaled || rows.extent() == 0, "sharpkern: backup is empty");
    const auto move_all = [&](bool by_magnitude) {
      if constexpr (kIsMaster<T, W>) {
        return by_magnitude        ? move_from_master<T, W, true, false>
               : kept_g != nullptr ? move_from_master<T, W, false, true>
                                   : move_from_master<T, W, false, false>;
      } else if (kept == nullptr) {
        return kept_g != nullptr ? move<T, false, false, true> : move<T, false, false, false>;
      } else {
        return by_magnitude        ? move<T, true, true, false>
               : kept_g != nullptr ? move<T, false, true, true>
                                   : move<T, false, true, false>;
      }
    };
    const bool around = stream<T>(rows) && (kept != nullptr || kept_g != nullptr);
    walk_parallel(rows, [&](int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      if (!moves(row, scaled)) {
        return;
      }
      T* w = at<T>(row.param, offset);
      W* to = kept != nullptr ? kept + slot : nullptr;
      if (skip) {
        // 0 * inf is NaN: a skipped perturbation must not touch the gradient.
        if constexpr (!kIsMaster<T, W>) {
          if (to != nullptr) {
            std::copy(w, w + n, to);
          }
        }
        return;
      }
      T* to_g = kept_g != nullptr ? kept_g + slot : nullptr;
      const T* g = at<T>(row.grad, offset);
      const bool stream = around && (kIsMaster<T, W> ? streamable(w) : to == nullptr || streamable(to)) &&
                          (to_g == nullptr || streamable(to_g));
      const A s = static_cast<A>(radius[2 * row.group] / (norms.last + eps));
      const bool by_magnitude = scaled && row.scale == kMagnitude;
      move_all(by_magnitude)(w, to, to_g, g, n, s, by_magnitude ? radius[2 * row.group + 1] : 0, stream);
    });
  });
  if (backup.numel() != 0) {
    auto* marks = static_cast<Row*>(table.mutable_data_ptr());
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (moves(rows[i], scaled)) {
        marks[i].backup = 1;
      }
    }
  }
  if (count != nullptr) {
    count[0] += 1;
    count[1] += 1;
  }
}

void ascend(
    Tensors params, Tensor backup, Tensor gradient, Tensor counters, Tensors grads, Tensor table, Tensor,
    Tensor radius, Tensor sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  run(rows, backup, &gradient, counters, table, values(radius, rows, 2, "radius"), sq, false, eps,
      skip_nonfinite, dtype);
}

void ascend_scaled(
    Tensors params, Tensor backup, Tensor counters, Tensors grads, Tensor table, Tensor, Tensor radius,
    Tensor sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Rows rows(table);
  run(rows, backup, nullptr, counters, table, values(radius, rows, 2, "radius"), sq, true, eps,
      skip_nonfinite, dtype);
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("ascend", TORCH_BOX(&sharpkern::cpu::ascend));
  m.impl("ascend_scaled", TORCH_BOX(&sharpkern::cpu::ascend_scaled));
}
