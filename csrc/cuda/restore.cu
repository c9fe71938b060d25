// Undo the perturbation:  w = backup  wherever the backup holds the weights.
// Bytes a parameter, fp32: reads backup 4, writes w 4; of a half type with its master: writes w 2.
#include "launch.h"

namespace sharpkern::cuda {
namespace {

template <class T, class W>
struct Copying {
  T* w;  // null: nothing to do
  const W* kept;
  bool aligned;
};

template <class T, class W>
SK_KERNEL(kResident)
restore_kernel(Segments segments, const W* backup) {
  wait_for_previous();
  walk<Copying<T, W>>(
      segments,
      [&](const Stretch& stretch) {
        Copying<T, W> work = {};
        if (segments.cell(stretch.index, kBackup) != 0) {
          work.w = stretch.at<T>(stretch.row.param);
          work.kept = stretch.in(backup);
          work.aligned = are_aligned(work.w, work.kept);
        }
        return work;
      },
      [](const Copying<T, W>& work, int64_t n) {
        if (work.w != nullptr) {
          copy(work.w, work.kept, n, work.aligned);
        }
      });
}

void restore(Tensors params, Tensor backup, Tensor table, Tensor blocks, ScalarType dtype) {
  check_no_lists(params);
  const Call call(table, blocks);
  call.same_device({{&backup, "backup"}});
  visit_weights(dtype, weights_dtype(backup, dtype), [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    const W* kept = buffer<W>(backup, weights_dtype(backup, dtype), 0, "backup");
    STD_TORCH_CHECK(kept != nullptr || !call.has_blocks(), "sharpkern: backup is empty");
    call.launch("restore", restore_kernel<T, W>, kAnyGrid, call.segments(), kept);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("restore", TORCH_BOX(&sharpkern::cuda::restore)); }
