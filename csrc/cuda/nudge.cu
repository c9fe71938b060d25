// Nudged SGD, whose next momentum buffer is scaled along orthonormal directions e_k:
// along = [<the terms of buf without g, e_k>, <that of g, e_k>] and sq = ||g||^2  (nudge_dots), then
// buf = momentum buf + (1 - dampening) (+-clip g + weight_decay w);
// w -= lr (buf + (nudge - 1) sum_k <buf, e_k> e_k)  (nudge_sgd).
// Bytes a parameter, fp32, of K directions: reads w 4, g 4, buf 4 and e 4 K, each of the two; nudge_sgd
// writes w 4, buf 4. Without momentum no buf.
#include "descend.cuh"
#include "reduce.cuh"

namespace sharpkern::cuda {
namespace {

// Tiles at a time: float64, and the wide state of half types, would need more registers for two.
template <class T>
constexpr int kUnroll = std::is_same_v<T, float> ? 2 : 1;
template <class T>
constexpr int kNudgeResident = std::is_same_v<T, double> ? 2 : kResident;

template <class T, class W>
struct Meeting {
  const W* w;
  const T* g;                  // null: nothing to add
  const arithmetic_t<T>* buf;  // null: none
  const arithmetic_t<T>* e;    // of the first direction
  SgdCoefficients<arithmetic_t<T>> c;
  bool aligned;
};

// momentum is null where no group uses it. A sum that its thread alone adds to lies in shared memory: in
// registers there is no room for so many, nor an index.
template <class T, class W>
SK_KERNEL(kNudgeResident<T>)
nudge_dots_kernel(
    Segments segments, const W* master, const float* step, const double* groups,
    const arithmetic_t<T>* momentum, Directions<arithmetic_t<T>> directions, double* partials, double* sq,
    double* along, int64_t stride) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<T>;
  __shared__ double products[2 * kMostDirections][kThreads];
  const int count = static_cast<int>(2 * directions.count);
  for (int k = 0; k < count; ++k) {
    products[k][threadIdx.x] = 0;
  }
  double squared = 0;
  walk<Meeting<T, W>>(
      segments,
      [&](const Stretch& stretch) {
        Meeting<T, W> work = {};
        if (stretch.row.grad != 0) {
          const double* v = groups + stretch.row.group * kNudgeValues;
          work.w = kIsMaster<T, W> ? stretch.in(master) : stretch.at<const W>(stretch.row.param);
          work.g = stretch.at<const T>(stretch.row.grad);
          work.buf = momentum != nullptr && v[kSgdMomentum] != 0 ? stretch.in(momentum) : nullptr;
          work.e = stretch.in(directions.data);
          work.c = nudge_coefficients<A>(v, work.buf == nullptr || __ldcg(step + stretch.index) == 0, 1);
          work.aligned = are_aligned(work.w, work.g, work.buf, work.e, work.e + directions.size);
        }
        return work;
      },
      [&](const Meeting<T, W>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        elements<T, kUnroll<T>, A>(n, work.aligned, [&](auto tile, int64_t i) {
          const auto w = tile.load(work.w, i);
          const auto g = tile.load(work.g, i);
          auto kept = tile.template zeros<A>();
          if (work.buf != nullptr) {
            kept = tile.load(work.buf, i);
          }
          auto pulled = tile.template zeros<A>();
          A squares = 0;
          tile.each([&](int u, int v) {
            const A d = static_cast<A>(g.pack[u].x[v]);
            kept.pack[u].x[v] = sgd_kept(static_cast<A>(w.pack[u].x[v]), kept.pack[u].x[v], work.c);
            pulled.pack[u].x[v] = sgd_pulled(d, work.c);
            squares += d * d;
          });
          squared += static_cast<double>(squares);
          for (int k = 0; k < count; k += 2) {
            const auto e = tile.load(work.e + k / 2 * directions.size, i);
            A without = 0;
            A of_gradient = 0;
            tile.each([&](int u, int v) {
              without += kept.pack[u].x[v] * e.pack[u].x[v];
              of_gradient += pulled.pack[u].x[v] * e.pack[u].x[v];
            });
            products[k][threadIdx.x] += static_cast<double>(without);
            products[k + 1][threadIdx.x] += static_cast<double>(of_gradient);
          }
        });
      });
  reduce(
      1 + count, partials, [&](int k) { return k == 0 ? squared : products[k - 1][threadIdx.x]; },
      [&](int k, double total) { *(k == 0 ? sq : along + (k - 1) * stride) = total; });
}

template <class A>
struct Nudging {
  SgdCoefficients<A> coefficients;
  A nudge;  // less 1
  bool momentum;
};

template <class T, class W>
SK_KERNEL(kNudgeResident<T>)
nudge_sgd_kernel(
    Rule<T, W> rule, arithmetic_t<T>* momentum, Directions<arithmetic_t<T>> directions, const double* along,
    int64_t buffers) {
  wait_for_previous();
  using A = arithmetic_t<T>;
  __shared__ A products[kMostDirections];
  if (threadIdx.x < directions.count) {
    // The first stretch's barrier comes before anyone reads them.
    const double clip = clip_factor(rule.squares.norms().last, rule.max_norm);
    products[threadIdx.x] = static_cast<A>(product_along(along, buffers, threadIdx.x, clip));
  }
  const auto has_momentum = [&](const double* v) { return momentum != nullptr && v[kSgdMomentum] != 0; };
  descend<Nudging<A>, kNudgeValues, void>(
      rule,
      [&](const double* v, float before, double scale) {
        const bool first = before == 0 || momentum == nullptr;
        return Nudging<A>{
            nudge_coefficients<A>(v, first, scale), static_cast<A>(v[kNudge] - 1), has_momentum(v)};
      },
      has_momentum,
      [&](int64_t slot) {
        const A* e = directions.data + slot;
        const A* buf = momentum != nullptr ? momentum + slot : nullptr;
        return are_aligned(buf, e, e + directions.size);
      },
      [&](const Descending<T, W, Nudging<A>>& work, int64_t n) {
        A* buf = work.c.momentum ? momentum + work.slot : nullptr;
        elements<T, kUnroll<T>, A>(n, work.aligned, [&](auto tile, int64_t i) {
          auto correction = tile.template zeros<A>();
          for (int k = 0; k < directions.count; ++k) {
            const auto e = tile.load(directions.row(k) + work.slot, i);
            const A factor = work.c.nudge * products[k];
            tile.each([&](int u, int v) { correction.pack[u].x[v] += factor * e.pack[u].x[v]; });
          }
          auto w = tile.load(work.from, i);
          const auto g = tile.load(work.g, i);
          auto b = tile.template zeros<A>();
          if (buf != nullptr) {
            b = tile.load(buf, i);
          }
          tile.each([&](int u, int v) {
            w.pack[u].x[v] = static_cast<W>(nudge_sgd(
                static_cast<A>(w.pack[u].x[v]), static_cast<A>(g.pack[u].x[v]), b.pack[u].x[v],
                correction.pack[u].x[v], work.c.coefficients));
          });
          if (buf != nullptr) {
            tile.store(buf, i, b);
          }
          store_weights(tile, work, i, w);
        });
      });
}

void nudge_dots(
    Tensor sq, Tensor along, Tensor partials, Tensors params, Tensor master, Tensors grads,
    Tensor momentum_buffer, Tensor step, Tensor eigenvectors, Tensor table, Tensor blocks,
    Tensor group_values, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device(
      {{&sq, "sq"},
       {&along, "along"},
       {&partials, "partials"},
       {&master, "master"},
       {&momentum_buffer, "momentum_buffer"},
       {&step, "step"},
       {&eigenvectors, "eigenvectors"},
       {&group_values, "values"}});
  const double* groups = values(group_values, call, kNudgeValues, "values");
  double* squared = element(sq);
  const float* steps = steps_of(call, step);
  check_master(master, dtype);
  visit_weights(dtype, weights_dtype(master, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    const Directions<A> directions(eigenvectors, state_dtype(dtype), 0);
    check_along(along, directions.count);
    const Partials partial(partials, 1 + 2 * directions.count);
    const W* weights = buffer<W>(master, weights_dtype(master, dtype), 0, "master");
    const A* momentum = buffer<A>(momentum_buffer, state_dtype(dtype), 0, "momentum_buffer");
    call.launch<kNudgeResident<T>>(
        "nudge_dots", nudge_dots_kernel<T, W>, partial.ctas, call.segments(), weights, steps, groups,
        momentum, directions, partial.data, squared, static_cast<double*>(along.mutable_data_ptr()),
        along.stride(0));
  });
}

void nudge_sgd(
    Tensors params, Tensor master, Tensor momentum_buffer, Tensor step, Tensor counters, Tensors grads,
    Tensor eigenvectors, Tensor table, Tensor blocks, Tensor group_values, Tensor sq, Tensor along,
    double max_norm, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device(
      {{&momentum_buffer, "momentum_buffer"},
       {&eigenvectors, "eigenvectors"},
       {&group_values, "values"},
       {&along, "along"}});
  const double* groups = values(group_values, call, kNudgeValues, "values");
  check_master(master, dtype);
  visit_weights(dtype, weights_dtype(master, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    const Directions<A> directions(eigenvectors, state_dtype(dtype), 0);
    const double* sums = matrix(along, 2 * directions.count, "along");
    A* momentum = buffer<A>(momentum_buffer, state_dtype(dtype), 0, "momentum_buffer");
    const auto rule =
        make_rule<T, W>(call, step, counters, master, "master", groups, sq, max_norm, skip_nonfinite, dtype);
    call.launch<kNudgeResident<T>>(
        "nudge_sgd", nudge_sgd_kernel<T, W>, kAnyGrid, rule, momentum, directions, sums, along.size(1));
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("nudge_dots", TORCH_BOX(&sharpkern::cuda::nudge_dots));
  m.impl("nudge_sgd", TORCH_BOX(&sharpkern::cuda::nudge_sgd));
}
