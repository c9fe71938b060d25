// Squared norm of the gradient of one flat buffer:  sq[buffer] = sum_i (T_i g_i)^2,  T = 1 (norm) or
// |w| + eta (norm_scaled); then AE-SAM's statistics of sum(sq), where they are kept.
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

template <class T, bool kScaled>
SK_KERNEL(kResident)
norm_kernel(Segments segments, const double* radius, double* partials, NormOutput output) {
  using A = arithmetic_t<T>;
  double sums[1] = {};
  double& sum = sums[0];
  walk<Squaring<T>>(
      segments,
      [&](const Stretch& stretch) {
        Squaring<T> work = {};
        if (stretch.row.grad != 0 && !(kScaled && stretch.row.scale == kLeftOut)) {
          work.g = stretch.at<const T>(stretch.row.grad);
          if (kScaled && stretch.row.scale == kMagnitude) {
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
  reduce(sums, partials, [&](int, double total) { output.write(total); });
}

void run(
    const char* name, const Call& call, const NormOutput& output, const Tensor& partials,
    const double* radius, ScalarType dtype) {
  call.same_device({{&partials, "partials"}});
  const Partials partial(partials, 1);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.launch(
        name, radius != nullptr ? norm_kernel<T, true> : norm_kernel<T, false>, partial.ctas, call.segments(),
        radius, partial.data, output);
  });
}

void norm(
    Tensor sq, Tensor partials, Tensor ema, Tensors grads, Tensor table, Tensor blocks, int64_t index,
    double decay, double coefficient, ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&ema, "ema"}});
  run("norm", call, NormOutput(sq, ema, index, decay, coefficient), partials, nullptr, dtype);
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensor ema, Tensors params, Tensors grads, Tensor table, Tensor blocks,
    Tensor radius, int64_t index, double decay, double coefficient, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&ema, "ema"}, {&radius, "radius"}});
  const double* groups = values(radius, call, 2, "radius");
  run("norm_scaled", call, NormOutput(sq, ema, index, decay, coefficient), partials, groups, dtype);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cuda::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cuda::norm_scaled));
}
