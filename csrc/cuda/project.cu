// LookSAM's second gradient g_s against the first one, g:  sq = [||g_s||^2, <g, g_s>]  (dots), and its part
// that is orthogonal to g:  g_v = g_s - <g, g_s> / ||g||^2 g,  sq = ||g_v||^2  (project).
// Bytes a parameter, fp32: reads g 4 and g_s 4, and project writes g_v 4.
#include "reduce.cuh"

namespace sharpkern::cuda {
namespace {

template <class T>
struct Multiplying {
  const T* g;    // null: there was none
  const T* g_s;  // null: nothing to add
  bool aligned;
};

template <class T>
SK_KERNEL(kResident)
dots_kernel(Segments segments, const T* gradient, double* partials, double* sq, int64_t stride) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<T>;
  double sums[2] = {};
  walk<Multiplying<T>>(
      segments,
      [&](const Stretch& stretch) {
        Multiplying<T> work = {};
        if (stretch.row.grad != 0) {
          work.g_s = stretch.at<const T>(stretch.row.grad);
          work.g = stretch.row.backup != 0 ? stretch.in(gradient) : nullptr;
        }
        work.aligned = are_aligned(work.g, work.g_s);
        return work;
      },
      [&](const Multiplying<T>& work, int64_t n) {
        if (work.g_s == nullptr) {
          return;
        }
        if (work.g == nullptr) {
          add_squares(sums[0], work.g_s, n, work.aligned);
          return;
        }
        elements<T, 2>(n, work.aligned, [&](auto tile, int64_t i) {
          const auto g = tile.load(work.g, i);
          const auto g_s = tile.load(work.g_s, i);
          A squares = 0;
          A products = 0;
          tile.each([&](int u, int v) {
            const A a = static_cast<A>(g_s.pack[u].x[v]);
            squares += a * a;
            products += static_cast<A>(g.pack[u].x[v]) * a;
          });
          sums[0] += static_cast<double>(squares);
          sums[1] += static_cast<double>(products);
        });
      });
  reduce(sums, partials, [&](int k, double total) { sq[k * stride] = total; });
}

template <class T>
struct Projecting {
  arithmetic_t<T>* g_v;  // null: nothing to do
  const T* g;            // null: there was none, as if it were zero
  const T* g_s;          // likewise
  arithmetic_t<T> along;
  bool aligned;
};

template <class T>
SK_KERNEL(kResident)
project_kernel(
    Segments segments, arithmetic_t<T>* g_v, const T* gradient, const double* products, int64_t buffers,
    double* partials, double* sq) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<T>;
  bool go = false;
  A along = 0;
  if (threadIdx.x == 0) {
    const Projection<A> projection(products, buffers);
    go = projection.go;
    along = projection.along;
  }
  double sums[1] = {};
  walk<Projecting<T>, Order::kBackwards>(
      segments,
      [&](const Stretch& stretch) {
        const Row& row = stretch.row;
        Projecting<T> work = {};
        if (go) {
          work.g_v = stretch.in(g_v);
          if (row.backup != 0) {
            work.g = stretch.in(gradient);
            work.along = along;
          }
          if (row.grad != 0) {
            work.g_s = stretch.at<const T>(row.grad);
          }
          work.aligned = are_aligned(work.g_v, work.g, work.g_s);
        }
        return work;
      },
      [&](const Projecting<T>& work, int64_t n) {
        if (work.g_v == nullptr) {
          return;
        }
        elements<T, 2, A>(n, work.aligned, [&](auto tile, int64_t i) {
          auto g = tile.template zeros<T>();
          auto g_s = g;
          if (work.g != nullptr) {
            g = tile.load(work.g, i);
          }
          if (work.g_s != nullptr) {
            g_s = tile.load(work.g_s, i);
          }
          auto direction = tile.template zeros<A>();
          A squares = 0;
          tile.each([&](int u, int v) {
            const A a =
                orthogonal(static_cast<A>(g_s.pack[u].x[v]), static_cast<A>(g.pack[u].x[v]), work.along);
            direction.pack[u].x[v] = a;
            squares += a * a;
          });
          tile.store(work.g_v, i, direction);
          sums[0] += static_cast<double>(squares);
        });
      });
  reduce(sums, partials, [&](int, double total) {
    if (go) {
      *sq = total;
    }
  });
}

// The flat buffer that kept g.
template <class T>
const T* first_gradient(const Call& call, const Tensor& gradient, ScalarType dtype) {
  const T* g = buffer<T>(gradient, dtype, 0, "gradient");
  STD_TORCH_CHECK(g != nullptr || !call.has_blocks(), "sharpkern: gradient is empty");
  return g;
}

void dots(
    Tensor sq, Tensor partials, Tensor gradient, Tensors grads, Tensor table, Tensor blocks,
    ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device({{&sq, "sq"}, {&partials, "partials"}, {&gradient, "gradient"}});
  STD_TORCH_CHECK(
      sq.scalar_type() == ScalarType::Double && sq.dim() == 1 && sq.size(0) == 2,
      "sharpkern: sq should be two float64 elements");
  const Partials partial(partials, 2);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* g = first_gradient<T>(call, gradient, dtype);
    call.launch(
        "dots", dots_kernel<T>, partial.ctas, call.segments(), g, partial.data,
        static_cast<double*>(sq.mutable_data_ptr()), sq.stride(0));
  });
}

void project(
    Tensor g_v, Tensor sq, Tensor partials, Tensor gradient, Tensors grads, Tensor table, Tensor blocks,
    Tensor products, ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device(
      {{&g_v, "g_v"},
       {&sq, "sq"},
       {&partials, "partials"},
       {&gradient, "gradient"},
       {&products, "products"}});
  const double* sums = matrix(products, 3, "products");
  double* out = element(sq);
  const Partials partial(partials, 1);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* direction = buffer<arithmetic_t<T>>(g_v, state_dtype(dtype), 0, "g_v");
    STD_TORCH_CHECK(direction != nullptr || !call.has_blocks(), "sharpkern: g_v is empty");
    const T* g = first_gradient<T>(call, gradient, dtype);
    call.launch(
        "project", project_kernel<T>, partial.ctas, call.segments(), direction, g, sums, products.size(1),
        partial.data, out);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) {
  m.impl("dots", TORCH_BOX(&sharpkern::cuda::dots));
  m.impl("project", TORCH_BOX(&sharpkern::cuda::project));
}
