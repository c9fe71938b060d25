// Undo the perturbation:  w = backup  wherever the backup holds the weights.
// Bytes a parameter, fp32: reads backup 4, writes w 4.
#include "launch.h"

namespace sharpkern::cuda {
namespace {

template <class T>
struct Copying {
  T* w;  // null: nothing to do
  const T* kept;
  bool aligned;
};

template <class T>
SK_KERNEL(kResident)
restore_kernel(Segments segments, const T* backup) {
  walk<Copying<T>>(
      segments,
      [&](const Stretch& stretch) {
        Copying<T> work = {};
        if (segments.cell(stretch.index, kBackup) != 0) {
          work.w = stretch.at<T>(stretch.row.param);
          work.kept = stretch.in(backup);
          work.aligned = are_aligned(work.w, work.kept);
        }
        return work;
      },
      [](const Copying<T>& work, int64_t n) {
        if (work.w != nullptr) {
          copy<T>(work.w, work.kept, n, work.aligned);
        }
      });
}

void restore(Tensors params, Tensor backup, Tensor table, Tensor blocks, ScalarType dtype) {
  check_no_lists(params);
  const Call call(table, blocks);
  call.same_device({{&backup, "backup"}});
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* kept = buffer<T>(backup, dtype, 0, "backup");
    STD_TORCH_CHECK(kept != nullptr || !call.has_blocks(), "sharpkern: backup is empty");
    call.launch("restore", restore_kernel<T>, kAnyGrid, call.segments(), kept);
  });
}

}  // namespace
}  // namespace sharpkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("restore", TORCH_BOX(&sharpkern::cuda::restore)); }
