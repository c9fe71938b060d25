// A direction or a running average of the gradients:  out = a x + b v  and  sq = ||out||^2,  x the gradients
// or a flat buffer; out may be v. Bytes a parameter, fp32: reads x 4 and v 4, writes out 4.
#include "reduce.h"

namespace sharpkern::cpu {
namespace {

// Streaming stores only where out is not v: that came through the cache.
template <class X, class A>
SK_CLONES void write_combined(
    A* out, Sums<X>& sums, const X* x, const A* v, int64_t n, A a, A b, bool stream) {
  int64_t i = 0;
  if (stream) {
    for (; i + kBurst <= n; i += kBurst) {
      alignas(64) A burst[kBurst];
#pragma omp simd
      for (int64_t j = 0; j < kBurst; ++j) {
        burst[j] = combined(static_cast<A>(x[i + j]), v[i + j], a, b);
        sums[j] += burst[j] * burst[j];
      }
      stream_burst(out + i, burst);
    }
    stream_end();
  }
  for_sums(i, n, [&](int64_t k, int64_t j) __attribute__((always_inline)) {
    const A d = combined(static_cast<A>(x[k]), v[k], a, b);
    out[k] = d;
    sums[j] += d * d;
  });
}

template <class A>
SK_CLONES void add_kept(Sums<A>& sums, const A* v, int64_t n) {
  for_sums(0, n, [&](int64_t i, int64_t j) __attribute__((always_inline)) { sums[j] += v[i] * v[i]; });
}

void combine(
    Tensor out, Tensor sq, Tensor partials, Tensor x, Tensor v, Tensors grads, Tensor table, Tensor,
    Tensor coefficients, Tensor checks, ScalarType dtype) {
  check_no_lists(grads);
  const Rows rows(table);
  double* sum = element(sq);
  const Reduction<1> reduction(rows, partials);
  const double* c = two_coefficients(coefficients);
  const bool flat = x.numel() != 0;
  // Of the gradients, or of what is flat.
  visit(flat ? state_dtype(dtype) : dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    using A = arithmetic_t<X>;
    A* to = buffer<A>(out, state_dtype(dtype), rows.extent(), "out");
    const A* with = buffer<A>(v, state_dtype(dtype), rows.extent(), "v");
    STD_TORCH_CHECK(to != nullptr || rows.extent() == 0, "sharpkern: out is empty");
    STD_TORCH_CHECK(with != nullptr || rows.extent() == 0, "sharpkern: v is empty");
    const X* from = buffer<X>(x, flat ? state_dtype(dtype) : dtype, rows.extent(), "x");
    if (checks.numel() != 0 && !Norms(checks, "checks").finite) {
      return;
    }
    const A a = static_cast<A>(c[0]);
    const A b = static_cast<A>(c[1]);
    const bool in_place = to == with;
    const bool around = !in_place && stream<A>(rows);
    const auto add = [&](Sums<X>* sums, int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      if (flat ? row.backup != 0 : row.grad != 0) {
        const X* own = flat ? from + slot : at<X>(row.grad, offset);
        write_combined<X, A>(to + slot, *sums, own, with + slot, n, a, b, around && streamable(to + slot));
      } else if (in_place) {
        add_kept<A>(*sums, with + slot, n);
      }
    };
    *sum = reduction.template run<X>(add)[0];
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("combine", TORCH_BOX(&sharpkern::cpu::combine)); }
