// Squared norm of the gradient of one flat buffer:  sq[buffer] = sum_i (T_i g_i)^2,  T = 1 (norm) or
// |w| + eta (norm_scaled); then AE-SAM's statistics of sum(sq), where they are kept.
// Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a CTA.
#include "reduce.cuh"

namespace sharpkern::cuda {
namespace {

// W: of the weights, wide where they are a master's.
template <class T, class W>
struct Squaring {
  const W* w;
  const T* g;  // null: nothing to add
  arithmetic_t<T> eta;
  bool scaled;
  bool aligned;
};

// master: null where the parameters are the weights.
template <class T, bool kScaled, class W>
SK_KERNEL(kResident)
norm_kernel(Segments segments, const W* master, const double* radius, double* partials, NormOutput output) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<T>;
  double sums[1] = {};
  double& sum = sums[0];
  walk<Squaring<T, W>>(
      segments,
      [&](const Stretch& stretch) {
        Squaring<T, W> work = {};
        if (stretch.row.grad != 0 && !(kScaled && stretch.row.scale == kLeftOut)) {
          work.g = stretch.at<const T>(stretch.row.grad);
          if (kScaled && stretch.row.scale == kMagnitude) {
            work.w = kIsMaster<T, W> ? stretch.in(master) : stretch.at<const W>(stretch.row.param);
            work.eta = static_cast<A>(radius[2 * stretch.row.group + 1]);
            work.scaled = true;
          }
        }
        work.aligned = are_aligned(work.w, work.g);
        return work;
      },
      [&](const Squaring<T, W>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        if (kScaled && work.scaled) {
          constexpr int kUnroll = kIsMaster<T, W> ? 1 : 2;
          elements<T, kUnroll, W>(n, work.aligned, [&](auto tile, int64_t i) {
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

// master and radius are null where T = 1.
void run(
    const char* name, const Call& call, const NormOutput& output, const Tensor& partials,
    const Tensor* master, const double* radius, ScalarType dtype) {
  call.same_device({{&partials, "partials"}});
  const Partials partial(partials, 1);
  const ScalarType of_weights = master != nullptr ? weights_dtype(*master, dtype) : dtype;
  visit_weights(dtype, of_weights, [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    auto* kernel = norm_kernel<T, true, W>;
    const W* weights = nullptr;
    if constexpr (kIsMaster<T, W>) {
      weights = buffer<W>(*master, of_weights, 0, "master");
    } else if (radius == nullptr) {
      kernel = norm_kernel<T, false, W>;
    }
    call.launch(name, kernel, partial.ctas, call.segments(), weights, radius, partial.data, output);
  });
}

void norm(
    Tensor sq, Tensor partials, Tensor ema, Tensors grads, Tensor table, Tensor blocks, int64_t index,
    double decay, double coefficient, ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&ema, "ema"}});
  run("norm", call, NormOutput(sq, ema, index, decay, coefficient), partials, nullptr, nullptr, dtype);
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensor ema, Tensors params, Tensor master, Tensors grads, Tensor table,
    Tensor blocks, Tensor radius, int64_t index, double decay, double coefficient, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&ema, "ema"}, {&radius, "radius"}, {&master, "master"}});
  check_master(master, dtype);
  const double* groups = values(radius, call, 2, "radius");
  run("norm_scaled", call, NormOutput(sq, ema, index, decay, coefficient), partials, &master, groups, dtype);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cuda::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cuda::norm_scaled));
}
