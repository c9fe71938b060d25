// Perturbation with backup:  backup = w;  w += s g  (ascend)  or  w += s T^2 g  (ascend_scaled),
// s = rho / (norm + eps), rho signed by maximize; and the table's mark of every row that was kept.
// Bytes a parameter, fp32: reads w 4 and g 4, writes w 4 and backup 4.
#include "launch.h"

namespace sharpkern::cuda {
namespace {

template <class T>
struct Ascent {
  T* w;
  T* kept;
  const T* g;  // null: nothing to do
  arithmetic_t<T> s;
  arithmetic_t<T> eta;
  bool scaled;
  bool skip;
  bool aligned;
};

template <class T, bool kScaled>
__device__ __forceinline__ void move(const Ascent<T>& work, int64_t n) {
  using A = arithmetic_t<T>;
  elements<T, 2>(n, work.aligned, [&](auto tile, int64_t i) {
    auto w = tile.load(work.w, i);
    const auto g = tile.load(work.g, i);
    tile.store(work.kept, i, w);
    tile.each([&](int u, int v) {
      const A x = static_cast<A>(w.pack[u].x[v]);
      const A d = static_cast<A>(g.pack[u].x[v]);
      if constexpr (kScaled) {
        w.pack[u].x[v] = static_cast<T>(sharpkern::ascend_scaled(x, d, work.s, work.eta));
      } else {
        w.pack[u].x[v] = static_cast<T>(sharpkern::ascend(x, d, work.s));
      }
    });
    tile.store(work.w, i, w);
  });
}

template <class T, bool kScaled>
SK_KERNEL(kResident)
ascend_kernel(
    Segments segments, T* backup, int64_t* counters, const double* radius, Squares squares, double eps,
    bool skip_nonfinite) {
  using A = arithmetic_t<T>;
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
  walk<Ascent<T>>(
      segments,
      [&](const Stretch& stretch) {
        const Row& row = stretch.row;
        Ascent<T> work = {};
        if (stretch.starts_row()) {
          segments.cell(stretch.index, kBackup) = row.grad != 0;
        }
        if (row.grad != 0) {
          work.w = stretch.at<T>(row.param);
          work.kept = stretch.in(backup);
          work.g = stretch.at<const T>(row.grad);
          work.s = static_cast<A>(radius[2 * row.group] / (norm + eps));
          work.eta = static_cast<A>(radius[2 * row.group + 1]);
          work.scaled = kScaled && row.scaled != 0;
          work.skip = skip;
          work.aligned = are_aligned(work.w, work.kept, work.g);
        }
        return work;
      },
      [](const Ascent<T>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        if (work.skip) {
          // 0 * inf is NaN: a skipped perturbation must not touch the gradient.
          copy<T>(work.kept, work.w, n, work.aligned);
        } else if (kScaled && work.scaled) {
          move<T, kScaled>(work, n);
        } else {
          move<T, false>(work, n);
        }
      });
}

template <bool kScaled>
void run(
    const char* name, const Tensors& params, const Tensor& backup, const Tensor& counters,
    const Tensors& grads, const Tensor& table, const Tensor& blocks, const Tensor& radius, const Tensor& sq,
    double eps, bool skip_nonfinite, ScalarType dtype) {
  Call call(&params, &grads, table, blocks, dtype);
  call.same_device({{&backup, "backup"}, {&counters, "counters"}, {&radius, "radius"}, {&sq, "sq"}});
  const double* groups = values(radius, call, 2, "radius");
  const Squares squares(sq);
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* kept = buffer<T>(backup, dtype, 0, "backup");
    STD_TORCH_CHECK(kept != nullptr || !call.has_blocks(), "sharpkern: backup is empty");
    call.launch(
        name, ascend_kernel<T, kScaled>, kAnyGrid, call.segments(), kept, count, groups, squares, eps,
        skip_nonfinite);
  });
  call.copy_column(table, kBackup);
}

void ascend(
    Tensors params, Tensor backup, Tensor counters, Tensors grads, Tensor table, Tensor blocks, Tensor radius,
    Tensor sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  run<false>(
      "ascend", params, backup, counters, grads, table, blocks, radius, sq, eps, skip_nonfinite, dtype);
}

void ascend_scaled(
    Tensors params, Tensor backup, Tensor counters, Tensors grads, Tensor table, Tensor blocks, Tensor radius,
    Tensor sq, double eps, bool skip_nonfinite, ScalarType dtype) {
  run<true>(
      "ascend_scaled", params, backup, counters, grads, table, blocks, radius, sq, eps, skip_nonfinite,
      dtype);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("ascend", TORCH_BOX(&sharpkern::cuda::ascend));
  m.impl("ascend_scaled", TORCH_BOX(&sharpkern::cuda::ascend_scaled));
}
