// Collect a pass: the address of every gradient goes into the table, after a check of its layout.
// Host work for every device. A list of tensors through the typed boxing allocates twice a tensor;
// 400 of them are a third of a small step's host time, so this one reads its stack itself.
#include "common.h"

namespace sharpkern {
namespace {

constexpr int64_t kMismatch = -1;

int32_t code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      STD_TORCH_CHECK(false, "sharpkern: unsupported dtype ", torch::headeronly::toString(dtype));
  }
}

// Frees a borrowed list element on every way out.
struct Element {
  AtenTensorHandle handle;
  ~Element() { aoti_torch_delete_tensor_object(handle); }
};

// The list owns the elements that were not taken from it.
struct List {
  StableListHandle handle;
  size_t size = 0;
  size_t taken = 0;

  explicit List(StableListHandle list) : handle(list) {
    TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &size));
  }
  ~List() {
    while (taken < size) {
      const Element rest{take()};
    }
    torch_delete_list(handle);
  }
  List(const List&) = delete;
  List& operator=(const List&) = delete;

  AtenTensorHandle take() {
    StableIValue item{};
    torch_list_get_item(handle, taken++, &item);
    return torch::stable::detail::to<AtenTensorHandle>(item);
  }
};

// layout: [ndim, sizes..., strides...] of the parameter. Strides of size-1 dimensions do not count.
bool same_layout(AtenTensorHandle grad, const int64_t* layout) {
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int64_t dim = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(grad, &dim));
  if (dim != layout[0]) {
    return false;
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(grad, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(grad, &strides));
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != layout[1 + d] || (sizes[d] != 1 && strides[d] != layout[1 + dim + d])) {
      return false;
    }
  }
  return true;
}

bool same_device(AtenTensorHandle grad, int32_t type, int32_t index) {
  int32_t grad_type = 0;
  int32_t grad_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(grad, &grad_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(grad, &grad_index));
  return grad_type == type && grad_index == index;
}

// gather(Tensor(a!) table, Tensor(b!) status, Tensor[] grads, Tensor layout, Tensor like, *, dtype) -> ()
void gather(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Tensor table = to<Tensor>(stack[0]);
  const Tensor status = to<Tensor>(stack[1]);
  List list(to<StableListHandle>(stack[2]));
  const Tensor layout = to<Tensor>(stack[3]);
  const Tensor like = to<Tensor>(stack[4]);
  const int32_t dtype = code(to<ScalarType>(stack[5]));
  int32_t device = 0;
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const int32_t strided = aoti_torch_layout_strided();

  const auto n = static_cast<int64_t>(list.size);
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(0) == n &&
          table.size(1) == kColumns && table.is_contiguous(),
      "sharpkern: table should be int64, one row of ", kColumns, " columns a gradient");
  STD_TORCH_CHECK(
      layout.scalar_type() == ScalarType::Long && layout.dim() == 2 && layout.size(0) == n &&
          layout.is_contiguous(),
      "sharpkern: layout should be int64, one row a gradient");
  STD_TORCH_CHECK(
      status.scalar_type() == ScalarType::Long && status.numel() == 2,
      "sharpkern: status should be two int64 elements");
  auto* rows = static_cast<Row*>(table.mutable_data_ptr());
  const auto* layouts = static_cast<const int64_t*>(layout.const_data_ptr());
  const int64_t width = layout.size(1);

  int64_t mismatches = 0;
  int64_t missing = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Element grad{list.take()};
    int32_t grad_layout = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(grad.handle, &grad_layout));
    if (grad_layout == strided) {
      int64_t numel = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(grad.handle, &numel));
      if (numel == 0) {
        rows[i].grad = 0;
        ++missing;
        continue;
      }
      int32_t grad_dtype = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(grad.handle, &grad_dtype));
      if (grad_dtype == dtype && same_device(grad.handle, device, index) &&
          same_layout(grad.handle, layouts + i * width)) {
        const void* address = nullptr;
        TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(grad.handle, &address));
        if (address != nullptr) {
          rows[i].grad = reinterpret_cast<int64_t>(address);
          continue;
        }
      }
    }
    rows[i].grad = kMismatch;
    ++mismatches;
  }
  auto* counts = static_cast<int64_t*>(status.mutable_data_ptr());
  counts[0] = mismatches;
  counts[1] = missing;
}

}  // namespace
}  // namespace sharpkern

// One key for each device whose gradients may be in the list; table, status and layout are always the host's.
STABLE_TORCH_LIBRARY_IMPL(sharpkern, CPU, m) { m.impl("gather", &sharpkern::gather); }
STABLE_TORCH_LIBRARY_IMPL(sharpkern, CUDA, m) { m.impl("gather", &sharpkern::gather); }
STABLE_TORCH_LIBRARY_IMPL(sharpkern, XPU, m) { m.impl("gather", &sharpkern::gather); }
