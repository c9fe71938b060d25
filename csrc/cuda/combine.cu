// A direction or a running average of the gradients:  out = a x + b v  and  sq = ||out||^2,  x the gradients
// or a flat buffer; out may be v. Bytes a parameter, fp32: reads x 4 and v 4, writes out 4.
#include "reduce.cuh"

namespace sharpkern::cuda {
namespace {

// A stretch's part of the arrays, of X and of X's arithmetic type.
template <class X>
struct Combining {
  arithmetic_t<X>* out;      // null: v counts as it is
  const X* x;                // null, too: as if it were zero
  const arithmetic_t<X>* v;  // null: nothing to do
  arithmetic_t<X> a;
  arithmetic_t<X> b;
  bool aligned;
};

template <class X>
struct Combination {
  Segments segments;
  arithmetic_t<X>* out;
  const X* x;  // null: the gradients
  const arithmetic_t<X>* v;
  const double* coefficients;  // [a, b]
  Squares checks;
};

template <class X>
SK_KERNEL(kResident)
combine_kernel(Combination<X> of, double* partials, double* sq) {
  wait_for_previous();
  let_next_start();
  using A = arithmetic_t<X>;
  const bool go = threadIdx.x == 0 && of.checks.norms().finite;
  double sums[1] = {};
  walk<Combining<X>>(
      of.segments,
      [&](const Stretch& stretch) {
        const Row& row = stretch.row;
        const bool taken = of.x != nullptr ? row.backup != 0 : row.grad != 0;
        Combining<X> work = {};
        if (go && (taken || of.out == of.v)) {
          work.v = stretch.in(of.v);
          work.b = 1;
        }
        if (go && taken) {
          work.out = stretch.in(of.out);
          work.x = of.x != nullptr ? stretch.in(of.x) : stretch.at<const X>(row.grad);
          work.a = static_cast<A>(of.coefficients[0]);
          work.b = static_cast<A>(of.coefficients[1]);
        }
        work.aligned = are_aligned(work.out, work.x, work.v);
        return work;
      },
      [&](const Combining<X>& work, int64_t n) {
        if (work.v == nullptr) {
          return;
        }
        elements<X, 2, A>(n, work.aligned, [&](auto tile, int64_t i) {
          auto x = tile.template zeros<X>();
          if (work.x != nullptr) {
            x = tile.load(work.x, i);
          }
          auto out = tile.load(work.v, i);
          A squares = 0;
          tile.each([&](int u, int v) {
            const A d = combined(static_cast<A>(x.pack[u].x[v]), out.pack[u].x[v], work.a, work.b);
            out.pack[u].x[v] = d;
            squares += d * d;
          });
          if (work.out != nullptr) {
            tile.store(work.out, i, out);
          }
          sums[0] += static_cast<double>(squares);
        });
      });
  reduce(sums, partials, [&](int, double total) {
    if (go) {
      *sq = total;
    }
  });
}

void combine(
    Tensor out, Tensor sq, Tensor partials, Tensor x, Tensor v, Tensors grads, Tensor table, Tensor blocks,
    Tensor coefficients, Tensor checks, ScalarType dtype) {
  check_no_lists(grads);
  const Call call(table, blocks);
  call.same_device(
      {{&out, "out"},
       {&sq, "sq"},
       {&partials, "partials"},
       {&x, "x"},
       {&v, "v"},
       {&coefficients, "coefficients"},
       {&checks, "checks"}});
  double* total = element(sq);
  const Partials partial(partials, 1);
  const double* c = two_coefficients(coefficients);
  const Squares squares = checks.numel() == 0 ? Squares{} : Squares(checks, "checks");
  const bool flat = x.numel() != 0;
  visit(flat ? state_dtype(dtype) : dtype, [&](auto tag) {
    using X = typename decltype(tag)::type;
    using A = arithmetic_t<X>;
    A* to = buffer<A>(out, state_dtype(dtype), 0, "out");
    const A* with = buffer<A>(v, state_dtype(dtype), 0, "v");
    STD_TORCH_CHECK(to != nullptr || !call.has_blocks(), "sharpkern: out is empty");
    STD_TORCH_CHECK(with != nullptr || !call.has_blocks(), "sharpkern: v is empty");
    const X* from = buffer<X>(x, state_dtype(dtype), 0, "x");
    call.launch(
        "combine", combine_kernel<X>, partial.ctas,
        Combination<X>{call.segments(), to, from, with, c, squares}, partial.data, total);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("combine", TORCH_BOX(&sharpkern::cuda::combine)); }
