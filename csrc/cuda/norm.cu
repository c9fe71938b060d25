// Squared norm of the gradient:  sq = sum_i (T_i g_i)^2,  T = 1 (norm) or |w| + eta (norm_scaled).
// Bytes a parameter, fp32: reads g 4 (and w 4), writes nothing but a partial sum a CTA. The last CTA to
// arrive adds the partial sums in a fixed order: the same bits on every run.
#include "launch.h"

namespace sharpkern::cuda {
namespace {

template <class T>
struct Squaring {
  const T* w;
  const T* g;  // null: nothing to add
  arithmetic_t<T> eta;
  bool scaled;
  bool aligned;
};

// The sum over the CTA, in a fixed order; right in thread 0.
__device__ __forceinline__ double sum_of_cta(double x) {
  __shared__ double warps[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_down_sync(0xffffffffu, x, distance);
  }
  if (threadIdx.x % kWarp == 0) {
    warps[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (const double warp : warps) {
      sum += warp;
    }
  }
  __syncthreads();  // the next sum may be written
  return sum;
}

// partials: [0] counts the CTAs that are through, as an integer; [1 + i] is the sum of CTA i.
template <class T, bool kScaled>
SK_KERNEL(kResident)
norm_kernel(Segments segments, const double* radius, double* partials, double* sq) {
  using A = arithmetic_t<T>;
  double sum = 0;
  walk<Squaring<T>>(
      segments,
      [&](const Stretch& stretch) {
        Squaring<T> work = {};
        if (stretch.row.grad != 0) {
          work.g = stretch.at<const T>(stretch.row.grad);
          if (kScaled && stretch.row.scaled != 0) {
            work.w = stretch.at<const T>(stretch.row.param);
            work.eta = static_cast<A>(radius[2 * stretch.row.group + 1]);
            work.scaled = true;
          }
        }
        work.aligned = are_aligned(work.w, work.g);
        return work;
      },
      [&](const Squaring<T>& work, int64_t n) {
        if (work.g == nullptr) {
          return;
        }
        // A thread widens after every tile: 32 squares at most lose nothing in the arithmetic type.
        if (kScaled && work.scaled) {
          elements<T, 2>(n, work.aligned, [&](auto tile, int64_t i) {
            const auto w = tile.load(work.w, i);
            const auto g = tile.load(work.g, i);
            A squares = 0;
            tile.each([&](int u, int v) {
              const A a =
                  static_cast<A>(g.pack[u].x[v]) * adaptive_scale(static_cast<A>(w.pack[u].x[v]), work.eta);
              squares += a * a;
            });
            sum += static_cast<double>(squares);
          });
        } else {
          elements<T, 4>(n, work.aligned, [&](auto tile, int64_t i) {
            const auto g = tile.load(work.g, i);
            A squares = 0;
            tile.each([&](int u, int v) {
              const A a = static_cast<A>(g.pack[u].x[v]);
              squares += a * a;
            });
            sum += static_cast<double>(squares);
          });
        }
      });
  sum = sum_of_cta(sum);

  __shared__ bool is_last;
  auto* ticket = reinterpret_cast<unsigned long long*>(partials);
  if (threadIdx.x == 0) {
    partials[1 + blockIdx.x] = sum;
    __threadfence();  // whoever sees the count sees the sum
    is_last = atomicAdd(ticket, 1ull) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  __threadfence();
  double total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    total += __ldcg(partials + 1 + i);  // other CTAs wrote it: not from this multiprocessor's cache
  }
  total = sum_of_cta(total);
  if (threadIdx.x == 0) {
    *sq = total;
    *ticket = 0;
  }
}

void run(
    const char* name, Call& call, const Tensor& sq, const Tensor& partials, const double* radius,
    ScalarType dtype) {
  STD_TORCH_CHECK(
      sq.scalar_type() == ScalarType::Double && sq.numel() == 1,
      "sharpkern: sq should be one float64 element");
  double* partial = buffer<double>(partials, ScalarType::Double, 2, "partials");
  STD_TORCH_CHECK(partial != nullptr, "sharpkern: partials is empty");
  call.same_device({{&sq, "sq"}, {&partials, "partials"}});
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.launch(
        name, radius != nullptr ? norm_kernel<T, true> : norm_kernel<T, false>, partials.numel() - 1,
        call.segments(), radius, partial, static_cast<double*>(sq.mutable_data_ptr()));
  });
}

void norm(Tensor sq, Tensor partials, Tensors grads, Tensor table, Tensor blocks, ScalarType dtype) {
  Call call(nullptr, &grads, table, blocks, dtype);
  run("norm", call, sq, partials, nullptr, dtype);
}

void norm_scaled(
    Tensor sq, Tensor partials, Tensors params, Tensors grads, Tensor table, Tensor blocks, Tensor radius,
    ScalarType dtype) {
  Call call(&params, &grads, table, blocks, dtype);
  call.same_device({{&radius, "radius"}});
  run("norm_scaled", call, sq, partials, values(radius, call, 2, "radius"), dtype);
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("norm", TORCH_BOX(&sharpkern::cuda::norm));
  m.impl("norm_scaled", TORCH_BOX(&sharpkern::cuda::norm_scaled));
}
