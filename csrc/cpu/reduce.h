// How a CPU kernel sums: independent sums inside a chunk of slot space, a partial sum a chunk, and the
// partial sums in order. Neither the number of threads nor alignment changes a bit.
#pragma once

#include <array>

#include "walk.h"

namespace sharpkern::cpu {

// 64 independent sums a chunk, in the arithmetic type: enough for two full vectors in flight on any
// machine, short enough (256 terms each) to lose nothing, and independent of alignment.
template <class T>
using Sums = arithmetic_t<T>[kBurst];

// f(element, which of the independent sums it belongs to) for every element of [begin, n) of a piece; begin
// is a multiple of kBurst.
template <class F>
SK_INLINE void for_sums(int64_t begin, int64_t n, F&& f) {
  int64_t i = begin;
  for (; i + kBurst <= n; i += kBurst) {
#pragma omp simd
    for (int64_t j = 0; j < kBurst; ++j) {
      f(i + j, j);
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < n - i; ++j) {
    f(i + j, j);
  }
}

// The totals of kSums sums at a time, or of fewer, over all of slot space; the last one of all may be a
// maximum of what is >= 0.
template <int kSums, bool kLastIsMax = false>
class Reduction {
 public:
  Reduction(const Rows& rows, const Tensor& partials, int64_t sums = kSums)
      : rows_(rows), chunks_((rows.extent() + kChunk - 1) / kChunk), sums_(sums) {
    partial_ = buffer<double>(partials, ScalarType::Double, 1 + sums * chunks_, "partials");
    STD_TORCH_CHECK(partial_ != nullptr, "sharpkern: partials is empty");
    ++partial_;  // a device kernel's ticket
  }

  // add(sums, row index, offset in the row, slot, length) for every piece.
  template <class T, class F>
  std::array<double, kSums> run(F&& add) const {
    torch::stable::parallel_for(0, chunks_, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        alignas(64) Sums<T> sums[kSums] = {};
        walk(
            rows_, chunk * kChunk, (chunk + 1) * kChunk,
            [&](int64_t i, int64_t offset, int64_t slot, int64_t n) { add(sums, i, offset, slot, n); });
        for (int64_t k = 0; k < sums_; ++k) {
          double sum = 0;
          for (const auto x : sums[k]) {
            sum = merged(k, sum, static_cast<double>(x));
          }
          partial_[chunk * sums_ + k] = sum;
        }
      }
    });
    std::array<double, kSums> totals = {};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      for (int64_t k = 0; k < sums_; ++k) {
        totals[k] = merged(k, totals[k], partial_[chunk * sums_ + k]);
      }
    }
    return totals;
  }

 private:
  static double merged(int64_t k, double a, double b) {
    return kLastIsMax && k == kSums - 1 ? std::max(a, b) : a + b;
  }

  const Rows& rows_;
  int64_t chunks_;
  int64_t sums_;
  double* partial_;
};

}  // namespace sharpkern::cpu
