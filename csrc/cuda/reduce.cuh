// What the ops that add up share: every CTA leaves its sums in `partials`, and the last one to arrive adds
// them in a fixed order, in the same launch: the same bits on every run.
#pragma once

#include "launch.h"

namespace sharpkern::cuda {

// sum += ||g||^2 of what this thread has of g. It widens after every tile: 32 squares at most lose nothing in
// the arithmetic type.
template <class T>
__device__ __forceinline__ void add_squares(double& sum, const T* g, int64_t n, bool aligned) {
  using A = arithmetic_t<T>;
  elements<T, 4>(n, aligned, [&](auto tile, int64_t i) {
    const auto x = tile.load(g, i);
    A squares = 0;
    tile.each([&](int u, int v) {
      const A a = static_cast<A>(x.pack[u].x[v]);
      squares += a * a;
    });
    sum += static_cast<double>(squares);
  });
}

// a + b, or the larger one.
template <bool kMax>
__device__ __forceinline__ double merged(double a, double b) {
  return kMax ? fmax(a, b) : a + b;
}

// The sum over the CTA, in a fixed order, or the maximum of what is >= 0; right in thread 0.
template <bool kMax = false>
__device__ __forceinline__ double sum_of_cta(double x) {
  __shared__ double warps[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = merged<kMax>(x, __shfl_down_sync(0xffffffffu, x, distance));
  }
  if (threadIdx.x % kWarp == 0) {
    warps[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (const double warp : warps) {
      sum = merged<kMax>(sum, warp);
    }
  }
  __syncthreads();  // the next sum may be written
  return sum;
}

// finish(k, total) of n sums over all threads of the grid, by one thread; sum(k) is what a thread has of one.
// The last one may be a maximum of what is >= 0. partials: [0] counts the CTAs that are through, as an
// integer; from [1 + n i] on are the sums of CTA i.
template <bool kLastIsMax = false, class Sum, class Finish>
__device__ __forceinline__ void reduce(int n, double* partials, Sum&& sum, Finish&& finish) {
  const auto over_cta = [&](int k, double x) {
    return kLastIsMax && k == n - 1 ? sum_of_cta<kLastIsMax>(x) : sum_of_cta(x);
  };
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const double of_cta = over_cta(k, sum(k));
    if (threadIdx.x == 0) {
      partials[1 + n * blockIdx.x + k] = of_cta;
    }
  }
  __shared__ bool is_last;
  auto* ticket = reinterpret_cast<unsigned long long*>(partials);
  if (threadIdx.x == 0) {
    __threadfence();  // whoever sees the count sees the sums
    is_last = atomicAdd(ticket, 1ull) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  __threadfence();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    double total = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
      // Other CTAs wrote it: not from this multiprocessor's cache.
      const double other = __ldcg(partials + 1 + n * i + k);
      total = kLastIsMax && k == n - 1 ? merged<true>(total, other) : total + other;
    }
    total = over_cta(k, total);
    if (threadIdx.x == 0) {
      finish(k, total);
    }
  }
  if (threadIdx.x == 0) {
    *ticket = 0;
  }
}

// The same of sums in registers.
template <bool kLastIsMax = false, int N, class Finish>
__device__ __forceinline__ void reduce(const double (&sums)[N], double* partials, Finish&& finish) {
  reduce<kLastIsMax>(N, partials, [&](int k) { return sums[k]; }, finish);
}

// Where so many sums a CTA go, and for how many CTAs there is room.
struct Partials {
  double* data;
  int64_t ctas;

  Partials(const Tensor& t, int64_t sums)
      : data(buffer<double>(t, ScalarType::Double, 1 + sums, "partials")), ctas((t.numel() - 1) / sums) {
    STD_TORCH_CHECK(data != nullptr, "sharpkern: partials is empty");
  }
};

}  // namespace sharpkern::cuda
