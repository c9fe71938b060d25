// The host's side of a CUDA kernel: checks that need nothing from the device, and the launch. Nothing here
// reads device memory or waits; the addressed form allocates nothing either, so a CUDA graph may capture it.
#pragma once

#include "walk.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <utility>

// torch's shim header declares it only where torch's own headers were set up for CUDA, and only a torch with
// CUDA defines it: weak, so that one binary also loads into a torch without.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace sharpkern::cuda {

constexpr int64_t kAnyGrid = std::numeric_limits<int64_t>::max();

// The segments of one call, and its launches on the caller's current stream.
class Call {
 public:
  Call(
      const Tensors* params, const Tensors* grads, const Tensor& table, const Tensor& blocks,
      ScalarType dtype)
      : guard_(table.get_device_index()), device_(table.device()), table_(table) {
    STD_TORCH_CHECK(
        table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == kColumns,
        "sharpkern: table should be an int64 tensor of ", kColumns, " columns");
    STD_TORCH_CHECK(
        blocks.scalar_type() == ScalarType::Int && blocks.dim() == 2 && blocks.size(1) == 2 &&
            blocks.is_contiguous(),
        "sharpkern: blocks should be a contiguous int32 tensor of 2 columns");
    same_device({{&blocks, "blocks"}});
    check_list(params, dtype, "params");
    check_list(grads, dtype, "grads");
    params_ = params;
    grads_ = grads;
    segments_.blocks = static_cast<const int32_t*>(blocks.const_data_ptr());
    segments_.count = blocks.size(0);
  }

  int64_t rows() const { return table_.size(0); }
  bool has_blocks() const { return segments_.count > 0; }

  // Every argument lies where the table does; empty ones may lie anywhere.
  void same_device(std::initializer_list<std::pair<const Tensor*, const char*>> arguments) const {
    for (const auto& [t, name] : arguments) {
      STD_TORCH_CHECK(
          t->numel() == 0 || t->device() == device_, "sharpkern: ", name,
          " should be on the device of the table");
    }
  }

  // The kernel's view of the table, once every check is through. Where lists were handed over it is a copy
  // with their addresses: only the table's own are right when the lists are empty, only the lists' when a
  // tracer has swapped them.
  const Segments& segments() {
    const bool has_params = params_ != nullptr && !params_->empty();
    const bool has_grads = grads_ != nullptr && !grads_->empty();
    if (has_params || has_grads) {
      table_ = torch::stable::clone(table_);
      if (has_params) {
        write_addresses(*params_, kParam);
      }
      if (has_grads) {
        write_addresses(*grads_, kGrad);
      }
    }
    segments_.table = static_cast<int64_t*>(table_.mutable_data_ptr());
    segments_.row_stride = table_.stride(0);
    segments_.column_stride = table_.stride(1);
    return segments_;
  }

  // After a kernel wrote a column: bring it from the copy, if there is one, into the caller's table.
  void copy_column(const Tensor& table, Column column) const {
    if (table.const_data_ptr() != table_.const_data_ptr()) {
      Tensor to = torch::stable::select(table, 1, column);
      torch::stable::copy_(to, torch::stable::select(table_, 1, column));
    }
  }

  // One CTA a block, but no more than the device holds at a time, nor than `most`; at least one.
  template <int kOfMultiprocessor = kResident, class... P, class... A>
  void launch(const char* name, void (*kernel)(P...), int64_t most, A&&... arguments) const {
    const int32_t index = table_.get_device_index();
    void* stream = nullptr;
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr, "sharpkern: this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    // The runtime is linked statically and has a current device of its own beside torch's. Asking it for an
    // attribute costs nanoseconds.
    int multiprocessors = 0;
    check(cudaSetDevice(index), name);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), name);
    const int64_t grid = std::min({segments_.count, int64_t(multiprocessors) * kOfMultiprocessor, most});
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(grid, 1)));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...), name);
  }

 private:
  static void check(cudaError_t error, const char* name) {
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // told here, it is not the next one's
      STD_TORCH_CHECK(
          false, "sharpkern: the kernel ", name, " was not launched: ", cudaGetErrorString(error));
    }
  }

  void check_list(const Tensors* list, ScalarType dtype, const char* name) const {
    if (list == nullptr || list->empty()) {
      return;
    }
    STD_TORCH_CHECK(
        static_cast<int64_t>(list->size()) == rows(), "sharpkern: ", name, " has ", list->size(),
        " tensors, the table ", rows(), " rows");
    for (const Tensor& t : *list) {
      STD_TORCH_CHECK(
          t.scalar_type() == dtype, "sharpkern: ", name, " should be ", torch::headeronly::toString(dtype),
          ", found ", torch::headeronly::toString(t.scalar_type()));
      same_device({{&t, name}});
    }
  }

  // A tensor without elements has address 0. The copy waits for the device, because it starts from memory
  // that is not pinned: slow, and safe.
  void write_addresses(const Tensors& list, Column column) {
    std::vector<int64_t> addresses;
    for (const Tensor& t : list) {
      const void* address = t.numel() == 0 ? nullptr : t.const_data_ptr();
      addresses.push_back(reinterpret_cast<int64_t>(address));
    }
    const int64_t size = rows();
    const int64_t stride = 1;
    const Tensor host = torch::stable::from_blob(
        addresses.data(), {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        ScalarType::Long);
    Tensor to = torch::stable::select(table_, 1, column);
    torch::stable::copy_(to, host);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  Tensor table_;
  const Tensors* params_ = nullptr;
  const Tensors* grads_ = nullptr;
  Segments segments_ = {};
};

// A float64 table of group values. How many groups the rows name only the device knows: one at least.
inline const double* values(const Tensor& t, const Call& call, int64_t columns, const char* name) {
  return sharpkern::values(t, int64_t{call.has_blocks()}, columns, name);
}

// The squared norms that Norms is made of, on the device.
struct Squares {
  const double* sq;
  int64_t passes;
  int64_t buffers;

  explicit Squares(const Tensor& t) : sq(Norms::checked(t)), passes(t.size(0)), buffers(t.size(1)) {}

  __device__ __forceinline__ Norms norms() const { return Norms(sq, passes, buffers); }
};

}  // namespace sharpkern::cuda
