// Undo the perturbation:  w = backup  wherever the backup holds the weights.
// Bytes a parameter, fp32: reads backup 4, writes w 4.
#include "walk.h"

namespace sharpkern::cpu {
namespace {

void restore(Tensors params, Tensor backup, Tensor table, Tensor, ScalarType dtype) {
  check_no_lists(params);
  const Rows rows(table);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* kept = buffer<T>(backup, dtype, rows.extent(), "backup");
    STD_TORCH_CHECK(kept != nullptr || rows.extent() == 0, "sharpkern: backup is empty");
    walk_parallel(rows, [&](int64_t i, int64_t offset, int64_t slot, int64_t n) {
      if (rows[i].backup != 0) {
        std::copy(kept + slot, kept + slot + n, at<T>(rows[i].param, offset));
      }
    });
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("restore", TORCH_BOX(&sharpkern::cpu::restore)); }
