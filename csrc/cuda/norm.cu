// Squared norm of the gradient:  sq = sum_i (T_i g_i)^2,  T = 1 (norm, norm_ema) or |w| + eta (norm_scaled);
// norm_ema then updates AE-SAM's statistics of its sum over the flat buffers.
// Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a CTA.
#include "reduce.cuh"

namespace sharpkern::cuda {
namespace {

template <class T>
struct Squaring {
  const T* w;
  const T* g;  // null: nothing to add
  arithmetic_t<T> eta;
  bool scaled;
  bool aligned;
};

// AE-SAM's statistics, and what they are made of.
struct Statistics {
  double* ema = nullptr;       // null: none are kept
  const double* sq = nullptr;  // of every flat buffer, this one's among them
  int64_t buffers = 0;
  double decay = 0;
  double coefficient = 0;
};

template <class T, bool kScaled>
SK_KERNEL(kResident)
norm_kernel(Segments segments, const double* radius, double* partials, double* sq, Statistics statistics) {
  using A = arithmetic_t<T>;
  double sums[1] = {};
  double& sum = sums[0];
  walk<Squaring<T>>(
      segments,
      [&](const Stretch& stretch) {
        Squaring<T> work = {};
        if (stretch.row.grad != 0) {
          work.g = stretch.at<const T>(stretch.row.grad);
          if (kScaled && stretch.row.scaled != 0) {
            work.w = stretch.at<const T>(stretch.row.param);
            work.eta = static_cast<A>(radius[2 * stretch.row.group + 1]);
            work.scaled = true;
          }
        }
        work.aligned = are_aligned(work.w, work.g);
        return work;
      },
      [&](const Squaring<T>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        if (kScaled && work.scaled) {
          elements<T, 2>(n, work.aligned, [&](auto tile, int64_t i) {
            const auto w = tile.load(work.w, i);
            const auto g = tile.load(work.g, i);
            A squares = 0;
            tile.each([&](int u, int v) {
              const A a =
                  static_cast<A>(g.pack[u].x[v]) * adaptive_scale(static_cast<A>(w.pack[u].x[v]), work.eta);
              squares += a * a;
            });
            sum += static_cast<double>(squares);
          });
        } else {
          add_squares(sum, work.g, n, work.aligned);
        }
      });
  reduce(sums, partials, [&](const double (&totals)[1]) {
    *sq = totals[0];
    if (statistics.ema != nullptr) {
      const double n = sum_of_buffers(statistics.sq, statistics.buffers);
      update_ema(statistics.ema, n, statistics.decay, statistics.coefficient);
    }
  });
}

void run(
    const char* name, Call& call, double* sq, const Tensor& partials, const double* radius,
    const Statistics& statistics, ScalarType dtype) {
  call.same_device({{&partials, "partials"}});
  const Partials<1> partial(partials);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.launch(
        name, radius != nullptr ? norm_kernel<T, true> : norm_kernel<T, false>, partial.ctas, call.segments(),
        radius, partial.data, sq, statistics);
  });
}

void norm(Tensor sq, Tensor partials, Tensors grads, Tensor table, Tensor blocks, ScalarType dtype) {
  Call call(nullptr, &grads, table, blocks, dtype);
  call.same_device({{&sq, "sq"}});
  run("norm", call, element(sq), partials, nullptr, {}, dtype);
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensors params, Tensors grads, Tensor table, Tensor blocks, Tensor radius,
    ScalarType dtype) {
  Call call(&params, &grads, table, blocks, dtype);
  call.same_device({{&sq, "sq"}, {&radius, "radius"}});
  run("norm_scaled", call, element(sq), partials, values(radius, call, 2, "radius"), {}, dtype);
}

void norm_ema(
    Tensor sq, Tensor partials, Tensor ema, Tensors grads, Tensor table, Tensor blocks, int64_t index,
    double decay, double coefficient, ScalarType dtype) {
  Call call(nullptr, &grads, table, blocks, dtype);
  call.same_device({{&sq, "sq"}, {&ema, "ema"}});
  const EmaArguments arguments(sq, ema, index);
  const Statistics statistics{arguments.ema, arguments.sq, arguments.buffers, decay, coefficient};
  run("norm_ema", call, arguments.sq + index, partials, nullptr, statistics, dtype);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cuda::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cuda::norm_scaled));
  m.impl("norm_ema", TORCH_BOX(&sharpkern::cuda::norm_ema));
}
