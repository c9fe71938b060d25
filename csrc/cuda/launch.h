// The host's side of a CUDA kernel: checks that need nothing from the device, and the launch. Nothing here
// reads device memory, waits or allocates, so a CUDA graph may capture it.
#pragma once

#include "walk.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <map>
#include <utility>

// torch's shim header declares it only where torch's own headers were set up for CUDA, and only a torch with
// CUDA defines it: weak, so that one binary also loads into a torch without.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace sharpkern::cuda {

// The device of one call: its arguments lie there, and its kernels run there, on the caller's current stream.
class Device {
 public:
  // The device of a tensor, which errors call by its name.
  Device(const Tensor& t, const char* name)
      : guard_(t.get_device_index()), device_(t.device()), name_(name) {}

  // Every argument lies on the device; empty ones may lie anywhere.
  void holds(std::initializer_list<std::pair<const Tensor*, const char*>> arguments) const {
    for (const auto& [t, name] : arguments) {
      STD_TORCH_CHECK(
          t->numel() == 0 || t->device() == device_, "sharpkern: ", name, " should be on the device of the ",
          name_);
    }
  }

  // The runtime is linked statically and has a current device of its own beside torch's. Asking it for an
  // attribute costs nanoseconds.
  int multiprocessors(const char* name) const {
    int count = 0;
    check(cudaSetDevice(device_.index()), name);
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_.index()), name);
    return count;
  }

  template <class... P, class... A>
  void launch(const char* name, void (*kernel)(P...), int64_t grid, A&&... arguments) const {
    void* stream = nullptr;
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr, "sharpkern: this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream));
    check(cudaSetDevice(device_.index()), name);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = waits(reinterpret_cast<const void*>(kernel), name) ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...), name);
  }

 private:
  // Whether kernels wait for the one ahead of them (wait_for_previous), so that they may start early:
  // compiled for sm_90 or later they do. A later device also runs what was compiled for an earlier one, so
  // the code decides, not the device. It is the same of all kernels, and takes a while to ask.
  bool waits(const void* kernel, const char* name) const {
    thread_local std::map<int32_t, bool> known;
    const auto [found, is_new] = known.try_emplace(device_.index(), false);
    if (is_new) {
      cudaFuncAttributes attributes = {};
      int driver = 0;
      check(cudaFuncGetAttributes(&attributes, kernel), name);
      check(cudaDriverGetVersion(&driver), name);
      found->second = attributes.ptxVersion >= 90 && driver >= 12030;  // before 12.3 no graph captures it
    }
    return found->second;
  }

  static void check(cudaError_t error, const char* name) {
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // told here, it is not the next one's
      STD_TORCH_CHECK(
          false, "sharpkern: the kernel ", name, " was not launched: ", cudaGetErrorString(error));
    }
  }

  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  const char* name_;
};

constexpr int64_t kAnyGrid = std::numeric_limits<int64_t>::max();

// The segments of one call, and its launches.
class Call {
 public:
  Call(const Tensor& table, const Tensor& blocks) : device_(table, "table") {
    STD_TORCH_CHECK(
        table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == kColumns,
        "sharpkern: table should be an int64 tensor of ", kColumns, " columns");
    STD_TORCH_CHECK(
        blocks.scalar_type() == ScalarType::Int && blocks.dim() == 2 && blocks.size(1) == 2 &&
            blocks.is_contiguous(),
        "sharpkern: blocks should be a contiguous int32 tensor of 2 columns");
    same_device({{&blocks, "blocks"}});
    segments_.table = static_cast<int64_t*>(table.mutable_data_ptr());
    segments_.row_stride = table.stride(0);
    segments_.column_stride = table.stride(1);
    segments_.blocks = static_cast<const int32_t*>(blocks.const_data_ptr());
    segments_.count = blocks.size(0);
    rows_ = table.size(0);
  }

  int64_t rows() const { return rows_; }
  bool has_blocks() const { return segments_.count > 0; }

  // The kernel's view of the table.
  const Segments& segments() const { return segments_; }

  // Every argument lies where the table does.
  void same_device(std::initializer_list<std::pair<const Tensor*, const char*>> arguments) const {
    device_.holds(arguments);
  }

  // One CTA a block, but no more than the device holds at a time, nor than `most`; at least one.
  template <int kOfMultiprocessor = kResident, class... P, class... A>
  void launch(const char* name, void (*kernel)(P...), int64_t most, A&&... arguments) const {
    const int64_t resident = int64_t(device_.multiprocessors(name)) * kOfMultiprocessor;
    const int64_t grid = std::max<int64_t>(std::min({segments_.count, resident, most}), 1);
    device_.launch(name, kernel, grid, std::forward<A>(arguments)...);
  }

 private:
  Device device_;
  int64_t rows_;
  Segments segments_ = {};
};

// A float64 table of group values. How many groups the rows name only the device knows: one at least.
inline const double* values(const Tensor& t, const Call& call, int64_t columns, const char* name) {
  return sharpkern::values(t, int64_t{call.has_blocks()}, columns, name);
}

// The squared norms that Norms is made of, on the device.
struct Squares {
  const double* sq = nullptr;  // none: all are finite
  int64_t passes = 0;
  int64_t buffers = 0;

  Squares() = default;
  explicit Squares(const Tensor& t, const char* name = "sq")
      : sq(Norms::checked(t, name)), passes(t.size(0)), buffers(t.size(1)) {}

  __device__ __forceinline__ Norms norms() const { return Norms(sq, passes, buffers); }
};

}  // namespace sharpkern::cuda
