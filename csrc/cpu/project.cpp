// LookSAM's direction from the gradients g of the first pass and g_s of the second:
// sq = [||g_s||^2, <g, g_s>]  (dots), then  g_v = g_s - <g, g_s> / ||g||^2 g  and  sq = ||g_v||^2  (project).
// Bytes a parameter, fp32: reads g 4 and g_s 4; project writes g_v 4.
#include "reduce.h"

namespace sharpkern::cpu {
namespace {

template <class T, bool kMarked>
SK_CLONES void add_products(Sums<T>* sums, const T* g, const T* g_s, int64_t n) {
  using A = arithmetic_t<T>;
  for_sums(0, n, [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const A second = static_cast<A>(g_s[i]);
    sums[0][j] += second * second;
    if constexpr (kMarked) {
      sums[1][j] += static_cast<A>(g[i]) * second;
    }
  });
}

// A gradient that is missing is zero.
template <class T, bool kMarked, bool kGrad>
SK_CLONES void write_orthogonal(
    arithmetic_t<T>* g_v, Sums<T>& sums, const T* g, const T* g_s, int64_t n, arithmetic_t<T> along,
    bool stream) {
  using A = arithmetic_t<T>;
  const auto direction = [&](int64_t i) __attribute__((always_inline)) {
    const A second = kGrad ? static_cast<A>(g_s[i]) : A(0);
    return kMarked ? orthogonal(second, static_cast<A>(g[i]), along) : second;
  };
  int64_t i = 0;
  if (stream) {
    for (; i + kBurst <= n; i += kBurst) {
      alignas(64) A burst[kBurst];
#pragma omp simd
      for (int64_t j = 0; j < kBurst; ++j) {
        burst[j] = direction(i + j);
        sums[j] += burst[j] * burst[j];
      }
      stream_burst(g_v + i, burst);
    }
    stream_end();
  }
  for_sums(i, n, [&](int64_t k, int64_t j) __attribute__((always_inline)) {
    const A d = direction(k);
    g_v[k] = d;
    sums[j] += d * d;
  });
}

// The flat buffer of g, which has to be there for the rows that were in the first pass.
template <class T>
const T* first_gradient(const Rows& rows, const Tensor& gradient, ScalarType dtype) {
  const T* first = buffer<T>(gradient, dtype, rows.extent(), "gradient");
  for (const Row& row : rows) {
    STD_TORCH_CHECK(row.backup == 0 || first != nullptr || row.numel == 0, "sharpkern: gradient is empty");
  }
  return first;
}

void dots(
    Tensor sq, Tensor partials, Tensor gradient, Tensors grads, Tensor table, Tensor, ScalarType dtype) {
  check_no_lists(grads);
  const Rows rows(table);
  STD_TORCH_CHECK(
      sq.scalar_type() == ScalarType::Double && sq.dim() == 1 && sq.numel() == 2,
      "sharpkern: sq should be two float64 elements");
  const Reduction<2> reduction(rows, partials);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* first = first_gradient<T>(rows, gradient, dtype);
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      if (row.grad == 0) {
        return;
      }
      const T* g_s = at<T>(row.grad, offset);
      if (row.backup != 0) {
        add_products<T, true>(sums, first + slot, g_s, n);
      } else {
        add_products<T, false>(sums, nullptr, g_s, n);
      }
    };
    const auto [squared, product] = reduction.template run<T>(add);
    auto* out = static_cast<double*>(sq.mutable_data_ptr());
    out[0] = squared;
    out[sq.stride(0)] = product;
  });
}

void project(
    Tensor g_v, Tensor sq, Tensor partials, Tensor gradient, Tensors grads, Tensor table, Tensor,
    Tensor products, ScalarType dtype) {
  check_no_lists(grads);
  const Rows rows(table);
  double* out = element(sq);
  const Reduction<1> reduction(rows, partials);
  const double* matrix_of_products = matrix(products, 3, "products");
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const T* first = first_gradient<T>(rows, gradient, dtype);
    A* kept = buffer<A>(g_v, state_dtype(dtype), rows.extent(), "g_v");
    STD_TORCH_CHECK(kept != nullptr || rows.extent() == 0, "sharpkern: g_v is empty");
    const Projection<A> projection(matrix_of_products, products.size(1));
    if (!projection.go) {
      return;
    }
    const A along = projection.along;
    const bool around = stream<A>(rows);
    const auto add = [&](Sums<T>* sums, int64_t i, int64_t offset, int64_t slot, int64_t n) {
      const Row& row = rows[i];
      A* to = kept + slot;
      const bool stream = around && streamable(to);
      if (row.backup != 0 && row.grad != 0) {
        write_orthogonal<T, true, true>(to, *sums, first + slot, at<T>(row.grad, offset), n, along, stream);
      } else if (row.backup != 0) {
        write_orthogonal<T, true, false>(to, *sums, first + slot, nullptr, n, along, stream);
      } else if (row.grad != 0) {
        write_orthogonal<T, false, true>(to, *sums, nullptr, at<T>(row.grad, offset), n, along, stream);
      } else {
        std::fill(to, to + n, A(0));
      }
    };
    *out = reduction.template run<T>(add)[0];
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("dots", TORCH_BOX(&sharpkern::cpu::dots));
  m.impl("project", TORCH_BOX(&sharpkern::cpu::project));
}
