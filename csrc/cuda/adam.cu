// Adam and AdamW from the backup or in place (the decay's form is a value of the group):
// d = +-clip (a g + b v) + weight_decay w;  m = beta1 m + (1 - beta1) d;  v = beta2 v + (1 - beta2) d^2;
// w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
// Bytes a parameter, fp32: reads w 4, g 4, m 4, v 4, writes w 4, m 4, v 4; amsgrad 8, a direction 4 more.
// Of a half type with its master: reads that 4 and g 2, writes both, 6.
#include "descend.cuh"

namespace sharpkern::cuda {
namespace {

// pow() and nine coefficients need more registers than four CTAs would leave.
template <class T>
constexpr int kAdamResident = sizeof(T) == 8 ? 2 : 3;

template <class A>
struct State {
  A* m;
  A* v;
  A* vmax;  // null where no group uses it
};

template <class A>
struct Adam {
  AdamCoefficients<A> coefficients;
  bool amsgrad;
};

template <bool kAmsgrad, class V, class T, class W, class A>
__device__ __forceinline__ void update(
    const Rule<T, W>& rule, const Descending<T, W, Adam<A>>& work, const State<A>& state, int64_t n) {
  // In packs of W: 4 elements a thread beside a float32 master, for want of registers; 8 of a half type
  // without.
  elements<W, 1, A>(n, work.aligned, [&](auto tile, int64_t i) {
    const int64_t slot = work.slot + i;
    auto w = tile.load(work.from, i);
    const auto g = gradient<V>(tile, rule, work, i);
    auto first = tile.load(state.m, slot);
    auto second = tile.load(state.v, slot);
    auto largest = second;
    if constexpr (kAmsgrad) {
      largest = tile.load(state.vmax, slot);
    }
    tile.each([&](int u, int v) {
      w.pack[u].x[v] = static_cast<W>(adam<kAmsgrad>(
          static_cast<A>(w.pack[u].x[v]), g(u, v), first.pack[u].x[v], second.pack[u].x[v],
          largest.pack[u].x[v], work.c.coefficients));
    });
    tile.store(state.m, slot, first);
    tile.store(state.v, slot, second);
    if constexpr (kAmsgrad) {
      tile.store(state.vmax, slot, largest);
    }
    store_weights(tile, work, i, w);
  });
}

template <class T, class V, class W>
SK_KERNEL(kAdamResident<T>)
adam_kernel(Rule<T, W> rule, State<arithmetic_t<T>> state) {
  wait_for_previous();
  using A = arithmetic_t<T>;
  descend<Adam<A>, kAdamValues, V>(
      rule,
      [&](const double* x, float before, double scale) {
        const bool amsgrad = state.vmax != nullptr && x[kAdamAmsgrad] != 0;
        return Adam<A>{adam_coefficients<A>(x, static_cast<double>(before) + 1, scale), amsgrad};
      },
      [](const double*) { return true; },
      [&](int64_t slot) {
        return are_aligned(state.m + slot, state.v + slot) &&
               (state.vmax == nullptr || are_aligned(state.vmax + slot));
      },
      [&](const Descending<T, W, Adam<A>>& work, int64_t n) {
        if (work.c.amsgrad) {
          update<true, V>(rule, work, state, n);
        } else {
          update<false, V>(rule, work, state, n);
        }
      });
}

void adam_step(
    Tensors params, Tensor exp_avg, Tensor exp_avg_sq, Tensor max_exp_avg_sq, Tensor step, Tensor counters,
    Tensors grads, Tensor backup, Tensor direction, Tensor table, Tensor blocks, Tensor group_values,
    Tensor sq, Tensor coefficients, double max_norm, bool skip_nonfinite, ScalarType dtype) {
  check_no_lists(params, grads);
  const Call call(table, blocks);
  call.same_device(
      {{&exp_avg, "exp_avg"},
       {&exp_avg_sq, "exp_avg_sq"},
       {&max_exp_avg_sq, "max_exp_avg_sq"},
       {&group_values, "values"}});
  const double* groups = values(group_values, call, kAdamValues, "values");
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    using A = arithmetic_t<T>;
    State<A> state;
    state.m = buffer<A>(exp_avg, state_dtype(dtype), 0, "exp_avg");
    state.v = buffer<A>(exp_avg_sq, state_dtype(dtype), 0, "exp_avg_sq");
    state.vmax = buffer<A>(max_exp_avg_sq, state_dtype(dtype), 0, "max_exp_avg_sq");
    STD_TORCH_CHECK(
        (state.m != nullptr && state.v != nullptr) || !call.has_blocks(), "sharpkern: exp_avg is empty");
    const auto rule = make_rule<T, W>(
        call, step, counters, backup, direction, groups, sq, coefficients, max_norm, skip_nonfinite, dtype);
    const auto kernel = for_direction<T>(
        direction, dtype, [](auto v) { return &adam_kernel<T, typename decltype(v)::type, W>; });
    call.launch<kAdamResident<T>>("adam", kernel, kAnyGrid, rule, state);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("adam", TORCH_BOX(&sharpkern::cuda::adam_step)); }
