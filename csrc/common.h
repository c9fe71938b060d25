// What every op shares: the segment table, its checks, the visit of a dtype, the skip decision.
//
// Written against torch's stable ABI: no ATen header may be included here or in any file that uses it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "math.h"

namespace sharpkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Slot elements a partial sum covers. Fixed, so that a sum does not depend on the number of threads;
// a multiple of 32, so that a chunk starts on a cache line in every buffer. schema.py has its twin.
constexpr int64_t kChunk = 16384;

// One parameter, as a row of the int64 table; schema.py names the columns.
struct Row {
  int64_t param;   // address of the weights
  int64_t grad;    // address of the gradient, 0 when there is none in this pass
  int64_t backup;  // nonzero: the flat backup, not the parameter, holds the weights
  int64_t slot;    // first element in every flat buffer
  int64_t numel;
  int64_t group;   // row of the group tables
  int64_t scaled;  // 1: T_w = |w| + eta; 0: T_w = 1
  int64_t ticket;  // scratch of device kernels
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void visit(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Tag<float>{});
    case ScalarType::Double:
      return f(Tag<double>{});
    case ScalarType::BFloat16:
      return f(Tag<torch::headeronly::BFloat16>{});
    case ScalarType::Half:
      return f(Tag<torch::headeronly::Half>{});
    default:
      STD_TORCH_CHECK(false, "sharpkern: unsupported dtype ", torch::headeronly::toString(dtype));
  }
}

inline ScalarType state_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The table's rows, with the addresses of the lists where lists were handed over: only the table's
// own addresses are right when the lists are empty, only the lists' when a tracer has swapped them.
class Rows {
 public:
  Rows(const Tensors* params, const Tensors* grads, const Tensor& table, ScalarType dtype) {
    STD_TORCH_CHECK(
        table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == kColumns &&
            table.is_contiguous(),
        "sharpkern: table should be a contiguous int64 tensor of ", kColumns, " columns");
    begin_ = static_cast<const Row*>(table.const_data_ptr());
    size_ = table.size(0);
    const bool has_params = params != nullptr && !params->empty();
    const bool has_grads = grads != nullptr && !grads->empty();
    if (!has_params && !has_grads) {
      return;
    }
    copy_.assign(begin_, begin_ + size_);
    if (has_params) {
      check_list(*params, dtype, "params");
      for (int64_t i = 0; i < size_; ++i) {
        STD_TORCH_CHECK(
            (*params)[i].numel() == copy_[i].numel, "sharpkern: params[", i, "] has ", (*params)[i].numel(),
            " elements, its table row ", copy_[i].numel);
        copy_[i].param = reinterpret_cast<int64_t>((*params)[i].mutable_data_ptr());
      }
    }
    if (has_grads) {
      check_list(*grads, dtype, "grads");
      for (int64_t i = 0; i < size_; ++i) {
        const int64_t numel = (*grads)[i].numel();
        STD_TORCH_CHECK(
            numel == copy_[i].numel || numel == 0, "sharpkern: grads[", i, "] has ", numel,
            " elements, its table row ", copy_[i].numel);
        copy_[i].grad = numel == 0 ? 0 : reinterpret_cast<int64_t>((*grads)[i].const_data_ptr());
      }
    }
    begin_ = copy_.data();
  }

  const Row* begin() const { return begin_; }
  const Row* end() const { return begin_ + size_; }
  int64_t size() const { return size_; }
  const Row& operator[](int64_t i) const { return begin_[i]; }

  // Elements of slot space: where the last slot ends.
  int64_t extent() const { return size_ == 0 ? 0 : begin_[size_ - 1].slot + begin_[size_ - 1].numel; }

 private:
  void check_list(const Tensors& list, ScalarType dtype, const char* name) const {
    STD_TORCH_CHECK(
        static_cast<int64_t>(list.size()) == size_, "sharpkern: ", name, " has ", list.size(),
        " tensors, the table ", size_, " rows");
    for (const Tensor& t : list) {
      STD_TORCH_CHECK(
          t.scalar_type() == dtype, "sharpkern: ", name, " should be ", torch::headeronly::toString(dtype),
          ", found ", torch::headeronly::toString(t.scalar_type()));
    }
  }

  std::vector<Row> copy_;
  const Row* begin_ = nullptr;
  int64_t size_ = 0;
};

// A flat buffer's first element, after a check of its dtype and length. Empty buffers are for
// arguments that this call does not use.
template <class T>
T* buffer(const Tensor& t, ScalarType dtype, int64_t extent, const char* name) {
  if (t.numel() == 0) {
    return nullptr;
  }
  STD_TORCH_CHECK(
      t.scalar_type() == dtype && t.is_contiguous() && t.numel() >= extent, "sharpkern: ", name,
      " should be contiguous, ", torch::headeronly::toString(dtype), ", with at least ", extent, " elements");
  return static_cast<T*>(t.mutable_data_ptr());
}

// A float64 table of group values, with at least so many groups.
inline const double* values(const Tensor& t, int64_t groups, int64_t columns, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.dim() == 2 && t.size(1) == columns &&
          t.size(0) >= groups,
      "sharpkern: ", name, " should be a contiguous float64 tensor of ", groups, " rows and ", columns,
      " columns");
  return static_cast<const double*>(t.const_data_ptr());
}

inline const double* values(const Tensor& t, const Rows& rows, int64_t columns, const char* name) {
  int64_t groups = 0;
  for (const Row& row : rows) {
    groups = std::max(groups, row.group + 1);
  }
  return values(t, groups, columns, name);
}

// A float64 matrix with one column a flat buffer, and so many rows (0: any number).
inline const double* matrix(const Tensor& t, int64_t rows, const char* name) {
  const bool is_matrix = t.scalar_type() == ScalarType::Double && t.dim() == 2 && t.is_contiguous();
  STD_TORCH_CHECK(is_matrix, "sharpkern: ", name, " should be a contiguous float64 matrix");
  STD_TORCH_CHECK(
      rows == 0 || t.size(0) == rows, "sharpkern: ", name, " should be a matrix of ", rows, " rows, found ",
      t.size(0));
  return static_cast<const double*>(t.const_data_ptr());
}

// Where one sum goes.
inline double* element(const Tensor& sq) {
  STD_TORCH_CHECK(
      sq.scalar_type() == ScalarType::Double && sq.numel() == 1,
      "sharpkern: sq should be one float64 element");
  return static_cast<double*>(sq.mutable_data_ptr());
}

SK_INLINE double sum_of_buffers(const double* x, int64_t buffers) {
  double sum = 0;
  for (int64_t i = 0; i < buffers; ++i) {
    sum += x[i];
  }
  return sum;
}

// norm_ema's: the squared norms of all buffers, and AE-SAM's statistics of their sum.
struct EmaArguments {
  double* sq;
  double* ema;
  int64_t buffers;

  EmaArguments(const Tensor& squares, const Tensor& statistics, int64_t index) {
    STD_TORCH_CHECK(
        squares.scalar_type() == ScalarType::Double && squares.dim() == 1 && squares.is_contiguous(),
        "sharpkern: sq should be a contiguous float64 vector");
    STD_TORCH_CHECK(
        0 <= index && index < squares.numel(), "sharpkern: buffer should be an index of sq, which has ",
        squares.numel(), " elements, found ", index);
    STD_TORCH_CHECK(
        statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous() &&
            statistics.numel() == kEmaValues,
        "sharpkern: ema should be ", int64_t{kEmaValues}, " contiguous float64 elements");
    sq = static_cast<double*>(squares.mutable_data_ptr());
    ema = static_cast<double*>(statistics.mutable_data_ptr());
    buffers = squares.numel();
  }
};

// The squared norms of the passes of a step: one row a pass, one column a flat buffer.
struct Norms {
  bool finite = true;  // over every pass
  double last = 0;     // the norm of the last pass

  // In braces arguments are evaluated in order: the check comes first.
  explicit Norms(const Tensor& sq) : Norms{checked(sq), sq.size(0), sq.size(1)} {}

  SK_INLINE Norms(const double* sq, int64_t passes, int64_t buffers) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const double n = sum_of_buffers(sq + pass * buffers, buffers);
      finite = finite && std::isfinite(n);
      last = std::sqrt(n);
    }
  }

  static const double* checked(const Tensor& sq) { return matrix(sq, 0, "sq"); }
};

// LookSAM's projection, from the products g.g, g_s.g_s and g.g_s: a row each, one column a flat buffer.
template <class A>
struct Projection {
  bool go;  // every product is finite, and g is not zero
  A along;  // <g, g_s> / ||g||^2

  SK_INLINE Projection(const double* products, int64_t buffers) {
    const double first = sum_of_buffers(products, buffers);
    const double second = sum_of_buffers(products + buffers, buffers);
    const double product = sum_of_buffers(products + 2 * buffers, buffers);
    along = static_cast<A>(product / first);
    // A quotient may leave the range of float32: not g_v's fault, which would be infinite for good.
    go = std::isfinite(first) && std::isfinite(second) && std::isfinite(product) && first > 0 &&
         std::isfinite(along);
  }
};

// torch.nn.utils.clip_grad_norm_'s factor.
SK_INLINE double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return std::isinf(max_norm) || factor > 1.0 ? 1.0 : factor;  // a NaN norm gives NaN, as torch does
}

}  // namespace sharpkern
