// Squared norm of the gradient:  sq = sum_i (T_i g_i)^2,  T = 1 (norm) or |w| + eta (norm_scaled).
// Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a chunk.
#include "walk.h"

namespace sharpkern::cpu {
namespace {

// 64 independent sums a chunk, in the arithmetic type: enough for two full vectors in flight on any
// machine, short enough (256 terms each) to lose nothing, and independent of alignment.
template <class T>
using Sums = arithmetic_t<T>[kBlock];

template <class T, bool kScaled>
SK_INLINE arithmetic_t<T> squared(T w, T g, arithmetic_t<T> eta) {
  using A = arithmetic_t<T>;
  A a = static_cast<A>(g);
  if constexpr (kScaled) {
    a *= adaptive_scale(static_cast<A>(w), eta);
  }
  return a * a;
}

template <class T, bool kScaled>
SK_CLONES void add_squares(Sums<T>& sums, const T* w, const T* g, int64_t n, arithmetic_t<T> eta) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) {
      sums[j] += squared<T, kScaled>(kScaled ? w[i + j] : g[i + j], g[i + j], eta);
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < n - i; ++j) {
    sums[j] += squared<T, kScaled>(kScaled ? w[i + j] : g[i + j], g[i + j], eta);
  }
}

void reduce(
    const Tensor& sq, const Tensor& partials, const Rows& rows, const double* radius, ScalarType dtype) {
  STD_TORCH_CHECK(
      sq.scalar_type() == ScalarType::Double && sq.numel() == 1,
      "sharpkern: sq should be one float64 element");
  const int64_t chunks = (rows.extent() + kChunk - 1) / kChunk;
  double* partial = buffer<double>(partials, ScalarType::Double, 1 + chunks, "partials");
  STD_TORCH_CHECK(partial != nullptr, "sharpkern: partials is empty");
  ++partial;  // a device kernel's ticket
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    torch::stable::parallel_for(0, chunks, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        alignas(64) Sums<T> sums = {};
        walk(rows, chunk * kChunk, (chunk + 1) * kChunk, [&](int64_t i, int64_t offset, int64_t, int64_t n) {
          const Row& row = rows[i];
          if (row.grad == 0) {
            return;
          }
          const T* g = at<T>(row.grad, offset);
          if (radius != nullptr && row.scaled != 0) {
            add_squares<T, true>(sums, at<T>(row.param, offset), g, n, radius[2 * row.group + 1]);
          } else {
            add_squares<T, false>(sums, nullptr, g, n, 0);
          }
        });
        double sum = 0;
        for (const auto x : sums) {
          sum += static_cast<double>(x);
        }
        partial[chunk] = sum;
      }
    });
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    total += partial[chunk];
  }
  *static_cast<double*>(sq.mutable_data_ptr()) = total;
}

void norm(Tensor sq, Tensor partials, Tensors grads, Tensor table, Tensor, ScalarType dtype) {
  reduce(sq, partials, Rows(nullptr, &grads, table, dtype), nullptr, dtype);
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensors params, Tensors grads, Tensor table, Tensor, Tensor radius,
    ScalarType dtype) {
  const Rows rows(&params, &grads, table, dtype);
  reduce(sq, partials, rows, values(radius, rows, 2, "radius"), dtype);
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cpu::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cpu::norm_scaled));
}
