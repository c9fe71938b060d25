// Perturbation with backup:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
// s = rho / (norm + eps), rho signed by maximize. ascend may also keep the gradient, or move w in place.
// Bytes a parameter, fp32: reads w 4 and g 4, writes w 4, backup 4 and the kept gradient 4; of a half type
// with its master: reads that 4 and g 2, writes w 2.
#include "walk.h"

namespace sharpkern::cpu {
namespace {

template <bool kScaled, class A>
SK_INLINE A perturbed(A w, A g, A s, A eta) {
  if constexpr (kScaled) {
    return ascend_scaled(w, g, s, eta);
  } else {
    return ascend(w, g, s);
  }
}

// From the weights, which the backup keeps where there is one; or from a master, which is the backup.
template <class T, class W, bool kScaled, bool kBackup, bool kGradient>
SK_CLONES void move(
    T* w, W* backup, T* gradient, const T* g, int64_t n, arithmetic_t<T> s, arithmetic_t<T> eta,
    bool stream) {
  using A = arithmetic_t<T>;
  constexpr bool kMaster = kIsMaster<T, W>;
  constexpr bool kKeep = kBackup && !kMaster;
  const auto burst = [&](int64_t i, int64_t m, T* next, T* kept, T* kept_g) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<T, A>) {
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        const A x = w[i + j];
        const A d = g[i + j];
        if constexpr (kKeep) {
          kept[j] = x;
        }
        if constexpr (kGradient) {
          kept_g[j] = d;
        }
        next[j] = perturbed<kScaled>(x, d, s, eta);
      }
    } else {
      alignas(64) A x[kBurst];
      alignas(64) A d[kBurst];
      if constexpr (kMaster) {
        convert(backup + i, x, m);
      } else {
        convert(w + i, x, m);
      }
      convert(g + i, d, m);
      if constexpr (kKeep) {
        copy(w + i, kept, m);
      }
      if constexpr (kGradient) {
        copy(g + i, kept_g, m);
      }
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        x[j] = perturbed<kScaled>(x[j], d[j], s, eta);
      }
      convert(x, next, m);
    }
  };
  int64_t whole = 0;
  if (stream) {
    for (; whole + kBurst <= n; whole += kBurst) {
      alignas(64) T next[kBurst];
      alignas(64) T kept[kBurst];
      alignas(64) T kept_g[kBurst];
      burst(whole, kBurst, kMaster ? next : w + whole, kept, kept_g);
      if constexpr (kMaster) {
        stream_burst(w + whole, next);
      }
      if constexpr (kKeep) {
        stream_burst(backup + whole, kept);
      }
      if constexpr (kGradient) {
        stream_burst(gradient + whole, kept_g);
      }
    }
    stream_end();
  }
  for_bursts(n - whole, [&](int64_t first, int64_t m) __attribute__((always_inline)) {
    const int64_t i = whole + first;
    T* kept = nullptr;
    if constexpr (kKeep) {
      kept = backup + i;
    }
    burst(i, m, w + i, kept, kGradient ? gradient + i : nullptr);
  });
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
      if (kept == nullptr) {
        return kept_g != nullptr ? move<T, W, false, false, true> : move<T, W, false, false, false>;
      }
      return by_magnitude        ? move<T, W, true, true, false>
             : kept_g != nullptr ? move<T, W, false, true, true>
                                 : move<T, W, false, true, false>;
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
