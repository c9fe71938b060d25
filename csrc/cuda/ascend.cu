// Perturbation with backup:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
// s = rho / (norm + eps), rho signed by maximize; and the table's mark of every row that was kept.
// Bytes a parameter, fp32: reads w 4 and g 4, writes w 4 and backup 4; 4 more where ascend keeps g, 4 less
// where it has no backup. Of a half type with its master: reads that 4 and g 2, writes w 2.
#include "launch.h"

namespace sharpkern::cuda {
namespace {

// W: of the weights, wide where they are a master's.
template <class T, class W>
struct Ascent {
  T* w;
  W* kept;  // or the master, which is not written
  T* kept_g;
  const T* g;  // null: nothing to do
  arithmetic_t<T> s;
  arithmetic_t<T> eta;
  bool scaled;
  bool skip;
  bool aligned;
};

template <bool kScaled, bool kKeepW, bool kKeepG, class T, class W>
__device__ __forceinline__ void move(const Ascent<T, W>& work, int64_t n) {
  using A = arithmetic_t<T>;
  constexpr int kUnroll = kIsMaster<T, W> ? 1 : 2;
  elements<T, kUnroll, W>(n, work.aligned, [&](auto tile, int64_t i) {
    auto w = load_weights(tile, work.w, work.kept, i);
    const auto g = tile.load(work.g, i);
    if constexpr (kKeepW) {
      tile.store(work.kept, i, w);
    }
    if constexpr (kKeepG) {
      tile.store(work.kept_g, i, g);
    }
    tile.each([&](int u, int v) {
      const A x = static_cast<A>(w.pack[u].x[v]);
      const A d = static_cast<A>(g.pack[u].x[v]);
      if constexpr (kScaled) {
        w.pack[u].x[v] = static_cast<W>(sharpkern::ascend_scaled(x, d, work.s, work.eta));
      } else {
        w.pack[u].x[v] = static_cast<W>(sharpkern::ascend(x, d, work.s));
      }
    });
    tile.store(work.w, i, rounded<T>(w));
  });
}

// kKeepW: in the backup, or else w moves in place; kKeepG: in `gradient`. A backup that is a master has w.
template <class T, bool kScaled, bool kKeepW, bool kKeepG, class W>
SK_KERNEL(kResident)
ascend_kernel(
    Segments segments, W* backup, T* gradient, int64_t* counters, const double* radius, Squares squares,
    double eps, bool skip_nonfinite) {
  wait_for_previous();
  using A = arithmetic_t<T>;
  constexpr bool kKeeps = kKeepW && !kIsMaster<T, W>;
  double norm = 0;
  bool skip = false;
  if (threadIdx.x == 0) {
    const Norms norms = squares.norms();
    norm = norms.last;
    skip = skip_nonfinite && !norms.finite;
    if (blockIdx.x == 0 && counters != nullptr) {
      counters[0] += 1;
      counters[1] += 1;
    }
  }
  walk<Ascent<T, W>, Order::kBackwards>(
      segments,
      [&](const Stretch& stretch) {
        const Row& row = stretch.row;
        Ascent<T, W> work = {};
        const bool moves = row.grad != 0 && !(kScaled && row.scale == kLeftOut);
        if (kKeepW && stretch.starts_row()) {
          segments.cell(stretch.index, kBackup) = moves;
        }
        if (moves) {
          work.w = stretch.at<T>(row.param);
          work.kept = kKeepW ? stretch.in(backup) : nullptr;
          work.kept_g = kKeepG ? stretch.in(gradient) : nullptr;
          work.g = stretch.at<const T>(row.grad);
          work.s = static_cast<A>(radius[2 * row.group] / (norm + eps));
          work.eta = static_cast<A>(radius[2 * row.group + 1]);
          work.scaled = kScaled && row.scale == kMagnitude;
          work.skip = skip;
          work.aligned = are_aligned(work.w, work.kept, work.kept_g, work.g);
        }
        return work;
      },
      [](const Ascent<T, W>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        if (work.skip) {
          // 0 * inf is NaN: a skipped perturbation must not touch the gradient.
          if constexpr (kKeeps) {
            copy(work.kept, work.w, n, work.aligned);
          }
        } else if (kScaled && work.scaled) {
          move<kScaled, kKeeps, kKeepG>(work, n);
        } else {
          move<false, kKeeps, kKeepG>(work, n);
        }
      });
}

template <bool kScaled>
void run(
    const char* name, const Call& call, const Tensor& backup, const Tensor* gradient, const Tensor& counters,
    const Tensor& radius, const Tensor& sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  call.same_device({{&backup, "backup"}, {&counters, "counters"}, {&radius, "radius"}, {&sq, "sq"}});
  if (gradient != nullptr) {
    call.same_device({{gradient, "gradient"}});
  }
  const double* groups = values(radius, call, 2, "radius");
  const Squares squares(sq);
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    W* kept = buffer<W>(backup, weights_dtype(backup, dtype), 0, "backup");
    STD_TORCH_CHECK(!kScaled || kept != nullptr || !call.has_blocks(), "sharpkern: backup is empty");
    T* kept_g = gradient != nullptr ? buffer<T>(*gradient, dtype, 0, "gradient") : nullptr;
    auto* kernel = ascend_kernel<T, kScaled, true, false, W>;
    if constexpr (!kScaled) {
      if (kept_g != nullptr) {
        kernel = ascend_kernel<T, false, true, true, W>;
      }
      if constexpr (!kIsMaster<T, W>) {
        if (kept == nullptr) {
          kernel = kept_g != nullptr ? ascend_kernel<T, false, false, true, W>
                                     : ascend_kernel<T, false, false, false, W>;
        }
      }
    }
    call.launch(
        name, kernel, kAnyGrid, call.segments(), kept, kept_g, count, groups, squares, eps, skip_nonfinite);
  });
}

void ascend(
    Tensors params, Tensor backup, Tensor gradient, Tensor counters, Tensors grads, Tensor table,
    Tensor blocks, Tensor radius, Tensor sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  run<false>("ascend", call, backup, &gradient, counters, radius, sq, eps, skip_nonfinite, dtype);
}

void ascend_scaled(
    Tensors params, Tensor backup, Tensor counters, Tensors grads, Tensor table, Tensor blocks, Tensor radius,
    Tensor sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  run<true>("ascend_scaled", call, backup, nullptr, counters, radius, sq, eps, skip_nonfinite, dtype);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("ascend", TORCH_BOX(&sharpkern::cuda::ascend));
  m.impl("ascend_scaled", TORCH_BOX(&sharpkern::cuda::ascend_scaled));
}
