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
#include <type_traits>
#include <vector>

#include "math.h"

namespace sharpkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
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
  int64_t scale;   // which T_w, see below
  int64_t backup;  // nonzero: the flat backup, not the parameter, holds the weights
  int64_t slot;    // first element in every flat buffer
  int64_t numel;
  int64_t group;   // row of the group tables
  int64_t ticket;  // scratch of device kernels
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

// Values of Row::scale; schema.py names them, too.
constexpr int64_t kMagnitude = 1;  // T_w = |w| + eta; else T_w = 1
constexpr int64_t kLeftOut = 2;    // T_w = 0: neither read, nor moved, nor kept

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
      return f(Tag<BFloat16>{});
    case ScalarType::Half:
      return f(Tag<Half>{});
    default:
      STD_TORCH_CHECK(false, "sharpkern: unsupported dtype ", torch::headeronly::toString(dtype));
  }
}

inline ScalarType state_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A backup of the state's dtype beside parameters of a half type is a master: the weights of every row,
// marked or not, of which the parameters are the rounded values.
inline ScalarType weights_dtype(const Tensor& backup, ScalarType dtype) {
  const bool is_master = backup.numel() != 0 && backup.scalar_type() == state_dtype(dtype);
  return is_master ? state_dtype(dtype) : dtype;
}

// Whether backups of W are masters of parameters of T.
template <class T, class W>
constexpr bool kIsMaster = !std::is_same_v<T, W>;

// f(Tag<T>, Tag<W>): T of the parameters, W of the weights, which are of the same dtype or a master.
template <class F>
void visit_weights(ScalarType dtype, ScalarType weights, F&& f) {
  visit(dtype, [&](auto tag) {
    using A = arithmetic_t<typename decltype(tag)::type>;
    if constexpr (!std::is_same_v<A, typename decltype(tag)::type>) {
      if (weights != dtype) {
        return f(tag, Tag<A>{});
      }
    }
    f(tag, tag);
  });
}

// Of ops that have no other use for such a buffer; empty where the parameters are the weights.
inline void check_master(const Tensor& master, ScalarType dtype) {
  STD_TORCH_CHECK(
      master.numel() == 0 || weights_dtype(master, dtype) != dtype,
      "sharpkern: master should be Float, beside parameters of BFloat16 or Half");
}

// Lists of tensors are for the reference.
template <class... List>
void check_no_lists(const List&... lists) {
  STD_TORCH_CHECK(
      (lists.empty() && ...),
      "sharpkern: this backend reads addresses from the table; lists are for the reference");
}

// The table's rows, where the host can read them.
class Rows {
 public:
  explicit Rows(const Tensor& table) {
    STD_TORCH_CHECK(
        table.scalar_type() == ScalarType::Long && table.dim() == 2 && table.size(1) == kColumns &&
            table.is_contiguous(),
        "sharpkern: table should be a contiguous int64 tensor of ", kColumns, " columns");
    begin_ = static_cast<const Row*>(table.const_data_ptr());
    size_ = table.size(0);
  }

  const Row* begin() const { return begin_; }
  const Row* end() const { return begin_ + size_; }
  int64_t size() const { return size_; }
  const Row& operator[](int64_t i) const { return begin_[i]; }

  // Elements of slot space: where the last slot ends.
  int64_t extent() const { return size_ == 0 ? 0 : begin_[size_ - 1].slot + begin_[size_ - 1].numel; }

 private:
  const Row* begin_;
  int64_t size_;
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

// A float64 vector, one element a flat buffer.
inline double* vector(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Double && t.dim() == 1 && t.is_contiguous(), "sharpkern: ", name,
      " should be a contiguous float64 vector");
  return static_cast<double*>(t.mutable_data_ptr());
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

// Where a norm goes: its element of the squared norms of all flat buffers, and AE-SAM's statistics of their
// sum.
struct NormOutput {
  double* sq;  // [buffers]
  int64_t buffers;
  int64_t index;  // of the buffer that is measured
  double* ema;    // null: no statistics are kept
  double decay;
  double coefficient;

  NormOutput(const Tensor& squares, const Tensor& statistics, int64_t index, double decay, double coefficient)
      : sq(vector(squares, "sq")),
        buffers(squares.numel()),
        index(index),
        ema(nullptr),
        decay(decay),
        coefficient(coefficient) {
    STD_TORCH_CHECK(
        0 <= index && index < buffers, "sharpkern: buffer should be an index of sq, which has ", buffers,
        " elements, found ", index);
    if (statistics.numel() == 0) {
      return;
    }
    STD_TORCH_CHECK(
        statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous() &&
            statistics.numel() == kEmaValues,
        "sharpkern: ema should be ", int64_t{kEmaValues}, " contiguous float64 elements");
    ema = static_cast<double*>(statistics.mutable_data_ptr());
  }

  // By one thread, once a call.
  SK_INLINE void write(double squared) const {
    sq[index] = squared;
    if (ema != nullptr) {
      update_ema(ema, sum_of_buffers(sq, buffers), decay, coefficient);
    }
  }
};

// mix's arguments: the line that each coefficient lies on, over a quotient of two sums.
struct Mixture {
  double* coefficients;  // [2]
  const double* numerator;
  int64_t numerators;  // elements: flat buffers
  const double* denominator;
  int64_t denominators;
  double constant[2];
  double slope[2];
  bool root;

  Mixture(
      const Tensor& to, const Tensor& x, const Tensor& y, const std::vector<double>& constants,
      const std::vector<double>& slopes, bool root)
      : coefficients(vector(to, "coefficients")),
        numerator(vector(x, "numerator")),
        numerators(x.numel()),
        denominator(vector(y, "denominator")),
        denominators(y.numel()),
        root(root) {
    STD_TORCH_CHECK(to.numel() == 2, "sharpkern: coefficients should be 2 elements, found ", to.numel());
    STD_TORCH_CHECK(
        constants.size() == 2 && slopes.size() == 2,
        "sharpkern: constant and slope should be two numbers each");
    std::copy(constants.begin(), constants.end(), constant);
    std::copy(slopes.begin(), slopes.end(), slope);
  }

  SK_INLINE void write() const {
    const double q =
        quotient(sum_of_buffers(numerator, numerators), sum_of_buffers(denominator, denominators), root);
    for (int i = 0; i < 2; ++i) {
      coefficients[i] = on_line(constant[i], slope[i], q);
    }
  }
};

// [a, b] of a x + b v.
inline const double* two_coefficients(const Tensor& coefficients) {
  STD_TORCH_CHECK(
      coefficients.scalar_type() == ScalarType::Double && coefficients.is_contiguous() &&
          coefficients.numel() == 2,
      "sharpkern: coefficients should be two contiguous float64 elements");
  return static_cast<const double*>(coefficients.const_data_ptr());
}

// The coefficients of a rule's gradient on their way to it: [a, b], or null for 1 and 0.
inline const double* direction_coefficients(const Tensor& coefficients, const Tensor& direction) {
  if (coefficients.numel() == 0) {
    STD_TORCH_CHECK(direction.numel() == 0, "sharpkern: coefficients should be there for a direction");
    return nullptr;
  }
  return two_coefficients(coefficients);
}

// The squared norms of the passes of a step: one row a pass, one column a flat buffer.
struct Norms {
  bool finite = true;  // over every pass
  double last = 0;     // the norm of the last pass

  // In braces arguments are evaluated in order: the check comes first.
  explicit Norms(const Tensor& sq, const char* name = "sq")
      : Norms{checked(sq, name), sq.size(0), sq.size(1)} {}

  SK_INLINE Norms(const double* sq, int64_t passes, int64_t buffers) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const double n = sum_of_buffers(sq + pass * buffers, buffers);
      finite = finite && std::isfinite(n);
      last = std::sqrt(n);
    }
  }

  static const double* checked(const Tensor& sq, const char* name = "sq") { return matrix(sq, 0, name); }
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

// A matrix of directions on its way to a kernel: a row each, as long as a flat buffer.
template <class A>
struct Directions {
  const A* data;
  int64_t count;
  int64_t size;  // elements from one to the next

  Directions(const Tensor& t, ScalarType dtype, int64_t extent)
      : data(buffer<A>(t, dtype, 0, "eigenvectors")), count(0), size(0) {
    STD_TORCH_CHECK(
        t.dim() == 2 && 1 <= t.size(0) && t.size(0) <= kMostDirections && t.size(1) >= extent,
        "sharpkern: eigenvectors should be 1 to ", int64_t{kMostDirections}, " rows of at least ", extent,
        " elements");
    count = t.size(0);
    size = t.size(1);
  }

  SK_INLINE const A* row(int64_t k) const { return data + k * size; }
};

// Where the sums of nudge_dots go: two a direction, of any stride.
inline void check_along(const Tensor& along, int64_t directions) {
  STD_TORCH_CHECK(
      along.scalar_type() == ScalarType::Double && along.dim() == 1 && along.numel() == 2 * directions,
      "sharpkern: along should be ", 2 * directions, " float64 elements");
}

// <buf, e_k> of the next momentum buffer, from the sums of nudge_dots: [2 k, buffers].
SK_INLINE double product_along(const double* along, int64_t buffers, int64_t k, double clip) {
  const double* kept = along + 2 * k * buffers;
  return sum_of_buffers(kept, buffers) + clip * sum_of_buffers(kept + buffers, buffers);
}

// torch.nn.utils.clip_grad_norm_'s factor.
SK_INLINE double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return std::isinf(max_norm) || factor > 1.0 ? 1.0 : factor;  // a NaN norm gives NaN, as torch does
}

}  // namespace sharpkern
