// The ball of a p-norm, q = p / (p - 1): the largest magnitude m beside the squared norm (norm_max), then
// sq = sum (|g| / m)^q  (norm_p), then  backup = w;  w += s sign(g) (|g| / m)^(q - 1)  (ascend_p) with
// s = rho (m / (||g||_q + eps))^(q - 1),  ||g||_q = m sq^(1/q); and the table's mark of every row that was
// kept. Bytes a parameter, fp32: the norms read g 4; ascend_p reads w 4 and g 4, writes w 4 and backup 4;
// of a half type with its master it reads that 4 and g 2, and writes w 2.
#include "../pnorm.h"
#include "reduce.cuh"

namespace sharpkern::cuda {
namespace {

template <class T>
struct Gradient {
  const T* g;  // null: nothing to add
  bool aligned;

  __device__ __forceinline__ explicit Gradient(const Stretch& stretch)
      : g(stretch.row.grad != 0 ? stretch.at<const T>(stretch.row.grad) : nullptr), aligned(are_aligned(g)) {}
  Gradient() = default;
};

template <class T>
SK_KERNEL(kResident)
norm_max_kernel(Segments segments, double* partials, double* largest, NormOutput output) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<T>;
  double sums[2] = {};
  walk<Gradient<T>>(
      segments, [&](const Stretch& stretch) { return Gradient<T>(stretch); },
      [&](const Gradient<T>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        elements<T, 4>(n, work.aligned, [&](auto tile, int64_t i) {
          const auto g = tile.load(work.g, i);
          A squares = 0;
          A most = 0;
          tile.each([&](int u, int v) {
            const A x = static_cast<A>(g.pack[u].x[v]);
            const A a = x < 0 ? -x : x;
            squares += x * x;
            most = a > most ? a : most;
          });
          sums[0] += static_cast<double>(squares);
          sums[1] = merged<true>(sums[1], static_cast<double>(most));
        });
      });
  reduce<true>(sums, partials, [&](int k, double total) {
    if (k == 0) {
      output.write(total);
    } else {
      largest[output.index] = total;
    }
  });
}

// A power of float64 takes more registers than four CTAs would leave.
template <class T>
constexpr int kPowerResident = sizeof(T) == 8 ? 2 : kResident;

template <class T>
struct Powering {
  Gradient<T> gradient;
  Peak<arithmetic_t<T>> peak;
};

template <class T>
SK_KERNEL(kPowerResident<T>)
norm_p_kernel(
    Segments segments, const double* largest, int64_t buffers, double q, double* partials, double* sq) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<T>;
  const A y = static_cast<A>(q);
  Peak<A> peak;
  if (threadIdx.x == 0) {
    peak = Peak<A>(largest_of(largest, buffers));
  }
  double sums[1] = {};
  walk<Powering<T>>(
      segments, [&](const Stretch& stretch) { return Powering<T>{Gradient<T>(stretch), peak}; },
      [&](const Powering<T>& work, int64_t n) {
        if (work.gradient.g == nullptr) {
          return;
        }
        elements<T, 2>(n, work.gradient.aligned, [&](auto tile, int64_t i) {
          const auto g = tile.load(work.gradient.g, i);
          A powers = 0;
          tile.each(
              [&](int u, int v) { powers += work.peak.large_power(static_cast<A>(g.pack[u].x[v]), y); });
          sums[0] += static_cast<double>(powers);
        });
      });
  reduce(sums, partials, [&](int, double total) { *sq = total; });
}

// W: of the weights, wide where they are a master's.
template <class T, class W>
struct Ascent {
  T* w;
  W* kept;     // or the master, which is not written
  const T* g;  // null: nothing to do
  arithmetic_t<T> s;
  Peak<arithmetic_t<T>> peak;
  bool skip;
  bool aligned;
};

template <class T, bool kSign, class W>
SK_KERNEL(kPowerResident<T>)
ascend_p_kernel(
    Segments segments, W* backup, int64_t* counters, const double* radius, Squares squares, DualNorm norm,
    bool skip_nonfinite) {
  wait_for_previous();
  using A = arithmetic_t<T>;
  const A y = static_cast<A>(norm.exponent);
  double scale = 0;
  bool skip = false;
  Peak<A> peak;
  if (threadIdx.x == 0) {
    skip = skip_nonfinite && !squares.norms().finite;
    scale = norm.scale();
    peak = Peak<A>(norm.largest());
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
        if (stretch.starts_row()) {
          segments.cell(stretch.index, kBackup) = row.grad != 0;
        }
        if (row.grad != 0) {
          work.w = stretch.at<T>(row.param);
          work.kept = stretch.in(backup);
          work.g = stretch.at<const T>(row.grad);
          work.s = static_cast<A>(radius[2 * row.group] * scale);
          work.peak = peak;
          work.skip = skip;
          work.aligned = are_aligned(work.w, work.kept, work.g);
        }
        return work;
      },
      [&](const Ascent<T, W>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        if (work.skip) {
          if constexpr (!kIsMaster<T, W>) {
            copy(work.kept, work.w, n, work.aligned);
          }
          return;
        }
        constexpr int kUnroll = kIsMaster<T, W> ? 1 : 2;
        elements<T, kUnroll, W>(n, work.aligned, [&](auto tile, int64_t i) {
          auto w = load_weights(tile, work.w, work.kept, i);
          const auto g = tile.load(work.g, i);
          if constexpr (!kIsMaster<T, W>) {
            tile.store(work.kept, i, w);
          }
          tile.each([&](int u, int v) {
            const A x = static_cast<A>(w.pack[u].x[v]);
            const A d = static_cast<A>(g.pack[u].x[v]);
            w.pack[u].x[v] = static_cast<W>(ascend_p<kSign>(x, d, work.s, work.peak, y));
          });
          tile.store(work.w, i, rounded<T>(w));
        });
      });
}

void norm_max(
    Tensor sq, Tensor largest, Tensor partials, Tensor ema, Tensors grads, Tensor table, Tensor blocks,
    int64_t index, double decay, double coefficient, ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&largest, "largest"}, {&partials, "partials"}, {&ema, "ema"}});
  const NormOutput output(sq, ema, index, decay, coefficient);
  double* maxima = maxima_beside(output, largest);
  const Partials partial(partials, 2);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.launch("norm_max", norm_max_kernel<T>, partial.ctas, call.segments(), partial.data, maxima, output);
  });
}

void norm_p(
    Tensor sq, Tensor partials, Tensors grads, Tensor table, Tensor blocks, Tensor largest, double q,
    ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&partials, "partials"}, {&largest, "largest"}});
  double* to = element(sq);
  const double* maxima = vector(largest, "largest");
  const Partials partial(partials, 1);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.launch(
        "norm_p", norm_p_kernel<T>, partial.ctas, call.segments(), maxima, largest.numel(), q, partial.data,
        to);
  });
}

void ascend_p(
    Tensors params, Tensor backup, Tensor counters, Tensors grads, Tensor table, Tensor blocks, Tensor radius,
    Tensor sq, Tensor largest, Tensor powers, double exponent, double eps, bool skip_nonfinite,
    ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device({{&backup, "backup"}, {&counters, "counters"}, {&radius, "radius"}, {&sq, "sq"}});
  call.same_device({{&largest, "largest"}, {&powers, "powers"}});
  const double* groups = values(radius, call, 2, "radius");
  const Squares squares(sq);
  const DualNorm norm(largest, powers, exponent, eps);
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    W* kept = buffer<W>(backup, weights_dtype(backup, dtype), 0, "backup");
    STD_TORCH_CHECK(kept != nullptr || !call.has_blocks(), "sharpkern: backup is empty");
    call.launch<kPowerResident<T>>(
        "ascend_p", exponent == 0 ? ascend_p_kernel<T, true, W> : ascend_p_kernel<T, false, W>, kAnyGrid,
        call.segments(), kept, count, groups, squares, norm, skip_nonfinite);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("norm_max", TORCH_BOX(&sharpkern::cuda::norm_max));
  m.impl("norm_p", TORCH_BOX(&sharpkern::cuda::norm_p));
  m.impl("ascend_p", TORCH_BOX(&sharpkern::cuda::ascend_p));
}
