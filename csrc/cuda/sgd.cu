// SGD from the backup or in place:  d = +-clip (a g + b v) + weight_decay w;
// buf = momentum buf + (1 - dampening) d;  w -= lr (nesterov ? d + momentum buf : buf).
// Bytes a parameter, fp32: reads w 4, g 4, buf 4, writes w 4, buf 4; without momentum 12; with a direction v
// 4 more. Of a half type with its master: reads that 4 and g 2, writes both, 6.
#include "descend.cuh"

namespace sharpkern::cuda {
namespace {

template <class A>
struct Sgd {
  SgdCoefficients<A> coefficients;
  bool momentum;
};

template <class V, class T, class W, class A>
__device__ __forceinline__ void update_momentum(
    const Rule<T, W>& rule, const Descending<T, W, Sgd<A>>& work, A* momentum, int64_t n) {
  A* buf = momentum + work.slot;
  // Loads in flight: of three arrays two packs each; of half types beside wide state one of 16 bytes of T,
  // which is two smaller packs; with a direction one of four arrays.
  constexpr int kUnroll = sizeof(A) == sizeof(T) && std::is_void_v<V> ? 2 : 1;
  elements<T, kUnroll, A>(n, work.aligned, [&](auto tile, int64_t i) {
    auto w = tile.load(work.from, i);
    const auto g = gradient<V>(tile, rule, work, i);
    auto b = tile.load(buf, i);
    tile.each([&](int u, int v) {
      w.pack[u].x[v] = static_cast<W>(
          sgd_momentum(static_cast<A>(w.pack[u].x[v]), g(u, v), b.pack[u].x[v], work.c.coefficients));
    });
    tile.store(buf, i, b);
    store_weights(tile, work, i, w);
  });
}

template <class V, class T, class W, class A>
__device__ __forceinline__ void update_plain(
    const Rule<T, W>& rule, const Descending<T, W, Sgd<A>>& work, int64_t n) {
  constexpr int kUnroll = kIsMaster<T, W> ? 1 : 2;
  using Widest = std::conditional_t<kIsMaster<T, W> || std::is_same_v<V, A>, A, T>;
  elements<T, kUnroll, Widest>(n, work.aligned, [&](auto tile, int64_t i) {
    auto w = tile.load(work.from, i);
    const auto g = gradient<V>(tile, rule, work, i);
    tile.each([&](int u, int v) {
      w.pack[u].x[v] =
          static_cast<W>(sgd_plain(static_cast<A>(w.pack[u].x[v]), g(u, v), work.c.coefficients));
    });
    store_weights(tile, work, i, w);
  });
}

// momentum is null where no group uses it.
template <class T, class V, class W>
SK_KERNEL(kResident)
sgd_kernel(Rule<T, W> rule, arithmetic_t<T>* momentum) {
  wait_for_previous();
  using A = arithmetic_t<T>;
  const auto has_momentum = [&](const double* v) { return momentum != nullptr && v[kSgdMomentum] != 0; };
  descend<Sgd<A>, kSgdValues, V>(
      rule,
      [&](const double* v, float before, double scale) {
        return Sgd<A>{sgd_coefficients<A>(v, before == 0, scale), has_momentum(v)};
      },
      has_momentum, [&](int64_t slot) { return momentum == nullptr || are_aligned(momentum + slot); },
      [&](const Descending<T, W, Sgd<A>>& work, int64_t n) {
        if (work.c.momentum) {
          update_momentum<V>(rule, work, momentum, n);
        } else {
          update_plain<V>(rule, work, n);
        }
      });
}

void sgd(
    Tensors params, Tensor momentum_buffer, Tensor step, Tensor counters, Tensors grads, Tensor backup,
    Tensor direction, Tensor table, Tensor blocks, Tensor group_values, Tensor sq, Tensor coefficients,
    double max_norm, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device({{&momentum_buffer, "momentum_buffer"}, {&group_values, "values"}});
  const double* groups = values(group_values, call, kSgdValues, "values");
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    A* momentum = buffer<A>(momentum_buffer, state_dtype(dtype), 0, "momentum_buffer");
    const auto rule = make_rule<T, W>(
        call, step, counters, backup, direction, groups, sq, coefficients, max_norm, skip_nonfinite, dtype);
    const auto kernel = for_direction<T>(
        direction, dtype, [](auto v) { return &sgd_kernel<T, typename decltype(v)::type, W>; });
    call.launch("sgd", kernel, kAnyGrid, rule, momentum);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("sgd", TORCH_BOX(&sharpkern::cuda::sgd)); }
