// Undo the perturbation:  w = backup  wherever the backup holds the weights.
// Bytes a parameter, fp32: reads backup 4, writes w 4; of a half type with its master: writes w 2.
#include "walk.h"

namespace sharpkern::cpu {
namespace {

void restore(Tensors params, Tensor backup, Tensor table, Tensor, ScalarType dtype) {
  check_no_lists(params);
  const Rows rows(table);
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    const W* kept = buffer<W>(backup, weights_dtype(backup, dtype), rows.extent(), "backup");
    STD_TORCH_CHECK(kept != nullptr || rows.extent() == 0, "sharpkern: backup is empty");
    walk_parallel(rows, [&](int64_t i, int64_t offset, int64_t slot, int64_t n) {
      if (rows[i].backup != 0) {
        put_back(at<T>(rows[i].param, offset), kept + slot, n);
      }
    });
  });
}

}  // namespace
}  // namespace sharpkern::cpu

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("restore", TORCH_BOX(&sharpkern::cpu::restore)); }
