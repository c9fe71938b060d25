// What every base rule shares: from where it steps, along which gradient, whether it steps at all, and who
// counts.
#pragma once

#include "launch.h"

namespace sharpkern::cuda {

// The arguments that every rule takes after its own state, as its kernel gets them. W: of the weights, wide
// where a master has them.
template <class T, class W>
struct Rule {
  Segments segments;
  W* backup;  // null: every row steps in place
  float* step;
  int64_t* counters;  // null: not counted
  const double* groups;
  Squares squares;
  double max_norm;
  bool skip_nonfinite;
  const double* coefficients;  // [a, b] of a g + b v; null: 1 and 0
  const void* direction;       // v, of a dtype that the kernel's template names; null: none
};

// A stretch and the coefficients of its rule. Without a gradient, or in a skipped step, g is null; where from
// is null then, too, there is nothing to do.
template <class T, class W, class C>
struct Descending {
  T* w;
  W* from;  // the backup, or w; or the master, which is written, too
  const T* g;
  int64_t slot;  // of its first element
  C c;
  arithmetic_t<T> a;  // of a g + b v, where there is a v
  arithmetic_t<T> b;
  bool aligned;
};

// (u, v) -> the gradient that a tile's elements step along, in the arithmetic type. V: the dtype of the
// direction, void where there is none.
template <class V, class Tile, class T, class W, class C>
__device__ __forceinline__ auto gradient(
    Tile tile, const Rule<T, W>& rule, const Descending<T, W, C>& work, int64_t i) {
  using A = arithmetic_t<T>;
  const auto g = tile.load(work.g, i);
  if constexpr (std::is_void_v<V>) {
    return [g](int u, int v) { return static_cast<A>(g.pack[u].x[v]); };
  } else {
    const auto direction = tile.load(static_cast<const V*>(rule.direction) + work.slot, i);
    return [g, direction, a = work.a, b = work.b](int u, int v) {
      return combined(static_cast<A>(g.pack[u].x[v]), static_cast<A>(direction.pack[u].x[v]), a, b);
    };
  }
}

// New weights of a tile: rounded into the parameter, as they are into a master.
template <class Tile, class T, class W, class C, class P>
__device__ __forceinline__ void store_weights(
    Tile tile, const Descending<T, W, C>& work, int64_t i, const P& weights) {
  if constexpr (kIsMaster<T, W>) {
    tile.store(work.from, i, weights);
  }
  tile.store(work.w, i, rounded<T>(weights));
}

// The row's step counter advances by one launch, however many stretches the row is cut into: for each the
// count from before is seen, and whoever has seen it for the last block writes.
struct Count {
  int64_t row;
  int64_t blocks;  // of this stretch; none: nothing to count
  int64_t of;      // the row's
  float before;
};

template <class T, class W>
__device__ __forceinline__ void count_step(const Rule<T, W>& rule, const Count& count) {
  if (count.blocks != count.of) {
    __threadfence();  // the count is read, and only then are these blocks through with it
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

// coefficients(group's values, step count before, factor of the gradient), counts(group's values): by one
// thread. aligned(slot): whether the rule's own buffers are. update(work, elements): by all of them.
template <
    class C, int64_t kValues, class V, class T, class W, class Coefficients, class Counts, class Aligned,
    class Update>
__device__ __forceinline__ void descend(
    const Rule<T, W>& rule, Coefficients&& coefficients, Counts&& counts, Aligned&& aligned,
    Update&& update) {
  using A = arithmetic_t<T>;
  double scale = 1;
  bool skip = false;
  Count count = {};  // thread 0's: counted when the others have their work already
  if (threadIdx.x == 0) {
    const Norms norms = rule.squares.norms();
    scale = clip_factor(norms.last, rule.max_norm);
    if (std::is_void_v<V> && rule.coefficients != nullptr) {
      scale *= rule.coefficients[0];
    }
    skip = rule.skip_nonfinite && !norms.finite;
    if (skip && blockIdx.x == 0 && rule.counters != nullptr) {
      rule.counters[2] += 1;
    }
  }
  walk<Descending<T, W, C>, Order::kBackwards>(
      rule.segments,
      [&](const Stretch& stretch) {
        const Row& row = stretch.row;
        const bool backed = rule.backup != nullptr && row.backup != 0;
        Descending<T, W, C> work = {};
        work.w = stretch.at<T>(row.param);
        if constexpr (kIsMaster<T, W>) {
          work.from = stretch.in(rule.backup);
        } else {
          work.from = backed ? stretch.in(rule.backup) : work.w;
        }
        work.slot = row.slot + stretch.begin;
        if (row.grad != 0 && !skip) {
          work.g = stretch.at<const T>(row.grad);
          const double* group = rule.groups + row.group * kValues;
          const float before = __ldcg(rule.step + stretch.index);
          work.c = coefficients(group, before, scale);
          if (counts(group)) {
            count = {stretch.index, stretch.blocks, (row.numel + kBlock - 1) / kBlock, before};
          }
        } else if (!backed) {
          work.from = nullptr;
        }
        work.aligned = are_aligned(work.w, work.from, work.g) && aligned(work.slot);
        if constexpr (!std::is_void_v<V>) {
          work.a = static_cast<A>(rule.coefficients[0]);  // here, not once: registers are what is short
          work.b = static_cast<A>(rule.coefficients[1]);
          work.aligned = work.aligned && are_aligned(static_cast<const V*>(rule.direction) + work.slot);
        }
        return work;
      },
      [&](const Descending<T, W, C>& work, int64_t n) {
        if (count.blocks != 0) {
          count_step(rule, count);
          count = {};
        }
        if (work.g != nullptr) {
          update(work, n);
        } else if (work.from != nullptr) {
          copy(work.w, work.from, n, work.aligned);
        }
      });
}

// Each row's steps so far.
inline float* steps_of(const Call& call, const Tensor& step) {
  float* steps = buffer<float>(step, ScalarType::Float, call.rows(), "step");
  STD_TORCH_CHECK(steps != nullptr || call.rows() == 0, "sharpkern: step is empty");
  return steps;
}

// Checks the arguments of a rule that steps along the clipped gradient, from a backup where that is not
// empty; its own state aside.
template <class T, class W>
Rule<T, W> make_rule(
    const Call& call, const Tensor& step, const Tensor& counters, const Tensor& backup, const char* name,
    const double* groups, const Tensor& sq, double max_norm, bool skip_nonfinite, ScalarType dtype) {
  call.same_device({{&step, "step"}, {&counters, "counters"}, {&sq, "sq"}, {&backup, name}});
  auto* count = buffer<int64_t>(counters, ScalarType::Long, 3, "counters");
  W* kept = buffer<W>(backup, weights_dtype(backup, dtype), 0, name);
  return {call.segments(), kept,     steps_of(call, step), count,   groups,
          Squares(sq),     max_norm, skip_nonfinite,       nullptr, nullptr};
}

// Those of one that may step from the backup, or along a g + b v.
template <class T, class W>
Rule<T, W> make_rule(
    const Call& call, const Tensor& step, const Tensor& counters, const Tensor& backup,
    const Tensor& direction, const double* groups, const Tensor& sq, const Tensor& coefficients,
    double max_norm, bool skip_nonfinite, ScalarType dtype) {
  call.same_device({{&direction, "direction"}, {&coefficients, "coefficients"}});
  Rule<T, W> rule =
      make_rule<T, W>(call, step, counters, backup, "backup", groups, sq, max_norm, skip_nonfinite, dtype);
  const bool narrow = direction.scalar_type() == dtype;
  rule.direction = buffer<void>(direction, narrow ? dtype : state_dtype(dtype), 0, "direction");
  rule.coefficients = direction_coefficients(coefficients, direction);
  return rule;
}

// choose(Tag<V>) for the dtype of the direction: void where there is none.
template <class T, class Choose>
auto for_direction(const Tensor& direction, ScalarType dtype, Choose&& choose) {
  if (direction.numel() == 0) {
    return choose(Tag<void>{});
  }
  return direction.scalar_type() == dtype ? choose(Tag<T>{}) : choose(Tag<arithmetic_t<T>>{});
}

}  // namespace sharpkern::cuda
