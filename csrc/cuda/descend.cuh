// What every base rule shares: from where it steps, whether it steps at all, and who counts.
#pragma once

#include "launch.h"

namespace sharpkern::cuda {

// What LookSAM adds to the gradient.
template <class A>
struct Mixture {
  const A* g_v = nullptr;  // null: nothing
  const double* sq = nullptr;
  int64_t buffers = 0;
  double alpha = 0;
};

// The arguments that every rule takes after its own state, as its kernel gets them.
template <class T>
struct Rule {
  Segments segments;
  const T* backup;  // null: every row steps in place
  float* step;
  int64_t* counters;  // null: not counted
  const double* groups;
  Squares squares;
  double max_norm;
  bool skip_nonfinite;
  Mixture<arithmetic_t<T>> mixture;
};

// A stretch and the coefficients of its rule. Without a gradient, or in a skipped step, g is null; from == w
// then means that there is nothing to do.
template <class T, class C>
struct Descent {
  T* w;
  const T* from;
  const T* g;
  int64_t slot;  // of its first element
  C c;
  arithmetic_t<T> mix;
  bool aligned;
};

// (u, v) -> the gradient that a tile's elements step with, in the arithmetic type.
template <bool kMixed, class Tile, class T, class C>
__device__ __forceinline__ auto gradient(
    Tile tile, const Rule<T>& rule, const Descent<T, C>& work, int64_t i) {
  using A = arithmetic_t<T>;
  const auto g = tile.load(work.g, i);
  if constexpr (kMixed) {
    const auto g_v = tile.load(rule.mixture.g_v + work.slot, i);
    return [g, g_v, mix = work.mix](int u, int v) {
      return static_cast<A>(g.pack[u].x[v]) + mix * g_v.pack[u].x[v];
    };
  } else {
    return [g](int u, int v) { return static_cast<A>(g.pack[u].x[v]); };
  }
}

// The row's step counter advances by one launch, however many CTAs share the row: each sees the count from
// before, and the last one to have seen it writes.
struct Count {
  int64_t row;
  int64_t blocks;  // of this CTA; none: nothing to count
  int64_t of;      // the row's
  float before;
};

template <class T>
__device__ __forceinline__ void count_step(const Rule<T>& rule, const Count& count) {
  if (count.blocks != count.of) {
    __threadfence();  // the count is read, and only then is this CTA through with it
    auto* ticket = reinterpret_cast<unsigned long long*>(&rule.segments.cell(count.row, kTicket));
    const auto blocks = static_cast<unsigned long long>(count.blocks);
    if (atomicAdd(ticket, blocks) + blocks != static_cast<unsigned long long>(count.of)) {
      return;
    }
    __threadfence();
    *ticket = 0;
  }
  rule.step[count.row] = count.before + 1;
}

// coefficients(group's values, step count before, clip factor), counts(group's values): by one thread.
// aligned(slot): whether the rule's own buffers are. update(work, elements): by all of them.
template <
    class C, int64_t kValues, bool kMixed, class T, class Coefficients, class Counts, class Aligned,
    class Update>
__device__ __forceinline__ void descend(
    const Rule<T>& rule, Coefficients&& coefficients, Counts&& counts, Aligned&& aligned, Update&& update) {
  double clip = 1;
  double mix = 0;
  bool skip = false;
  Count count = {};  // thread 0's: counted when the others have their work already
  if (threadIdx.x == 0) {
    const Norms norms = rule.squares.norms();
    clip = clip_factor(norms.last, rule.max_norm);
    if constexpr (kMixed) {
      const double g_v_sq = sum_of_buffers(rule.mixture.sq, rule.mixture.buffers);
      mix = mix_factor(norms.last, std::sqrt(g_v_sq), rule.mixture.alpha);
    }
    skip = rule.skip_nonfinite && !norms.finite;
    if (skip && blockIdx.x == 0 && rule.counters != nullptr) {
      rule.counters[2] += 1;
    }
  }
  walk<Descent<T, C>>(
      rule.segments,
      [&](const Stretch& stretch) {
        const Row& row = stretch.row;
        const bool backed = rule.backup != nullptr && row.backup != 0;
        Descent<T, C> work = {};
        work.w = stretch.at<T>(row.param);
        work.from = backed ? stretch.in(rule.backup) : work.w;
        work.slot = row.slot + stretch.begin;
        if (row.grad != 0 && !skip) {
          work.g = stretch.at<const T>(row.grad);
          const double* group = rule.groups + row.group * kValues;
          const float before = __ldcg(rule.step + stretch.index);
          work.c = coefficients(group, before, clip);
          if (counts(group)) {
            count = {stretch.index, stretch.blocks, (row.numel + kBlock - 1) / kBlock, before};
          }
        }
        work.aligned = are_aligned(work.w, work.from, work.g) && aligned(work.slot);
        if constexpr (kMixed) {
          work.mix = static_cast<arithmetic_t<T>>(mix);
          work.aligned = work.aligned && are_aligned(rule.mixture.g_v + work.slot);
        }
        return work;
      },
      [&](const Descent<T, C>& work, int64_t n) {
        if (count.blocks != 0) {
          count_step(rule, count);
          count = {};
        }
        if (work.g != nullptr) {
          update(work, n);
        } else if (work.from != work.w) {
          copy<T>(work.w, work.from, n, work.aligned);
        }
      });
}

// Checks the arguments of a rule; its own state aside.
template <class T>
Rule<T> make_rule(
    Call& call, const Tensor& step, const Tensor& counters, const Tensor& backup, const Tensor& g_v,
    const double* groups, const Tensor& sq, const Tensor& g_v_sq, double alpha, double max_norm,
    bool skip_nonfinite, ScalarType dtype) {
  call.same_device(
      {{&step, "step"}, {&counters, "counters"}, {&backup, "backup"}, {&g_v, "g_v"}, {&sq, "sq"}});
  float* steps = buffer<float>(step, ScalarType::Float, call.rows(), "step");
  STD_TORCH_CHECK(steps != nullptr || call.rows() == 0, "sharpkern: step is empty");
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  const T* kept = buffer<T>(backup, dtype, 0, "backup");
  const Squares squares(sq);
  Mixture<arithmetic_t<T>> mixture;
  mixture.g_v = buffer<arithmetic_t<T>>(g_v, state_dtype(dtype), 0, "g_v");
  if (mixture.g_v != nullptr) {
    call.same_device({{&g_v_sq, "g_v_sq"}});
    mixture.sq = matrix(g_v_sq, 1, "g_v_sq");
    mixture.buffers = g_v_sq.size(1);
    mixture.alpha = alpha;
  }
  return {call.segments(), kept, steps, count, groups, squares, max_norm, skip_nonfinite, mixture};
}

}  // namespace sharpkern::cuda
