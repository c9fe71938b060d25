// Where parameters and gradients lie, asked of the Python tensors themselves: no list of tensors goes through
// the dispatcher, and none is made. Who looks at a tensor is a Source: csrc/scan.cpp, csrc/aten/scan.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

namespace sharpkern {

namespace py = pybind11;

struct View {  // borrowed; strides in elements
  void* data;
  int32_t device_type, device_index;
  int32_t dtype;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

enum class Gradient { missing, unusable, seen };

// How the parameters of one layout lie. It holds none of them, which the garbage collector would not see:
// each call brings the list. Addresses of the host's int64 tensors, which outlive it: how each of `count`
// parameters lies, how its gradient has to, a row [dim, sizes..., strides...] of `width` each.
//
// Source::view(tensor, view) looks at a tensor, and tells whether it could; Source::gradient(parameter, view,
// held) at a parameter's gradient, of which the view is valid as long as `held` is what it was.
template <class Source>
class Scan {
 public:
  Scan(
      Source source, Py_ssize_t count, py::handle like, int64_t param_layouts, int64_t grad_layouts,
      int64_t width)
      : source_(std::move(source)),
        count_(count),
        param_layouts_(reinterpret_cast<const int64_t*>(param_layouts)),
        grad_layouts_(reinterpret_cast<const int64_t*>(grad_layouts)),
        width_(width) {
    if (!source_.view(like.ptr(), like_)) {
      throw py::value_error("this tensor cannot be looked at");
    }
  }

  // Whether every parameter is where `addresses` says, of the dtype, the device and the layout that it had.
  bool unmoved(const py::list& params, int64_t addresses) const {
    check(params);
    const auto* expected = reinterpret_cast<const int64_t*>(addresses);
    View view;
    for (Py_ssize_t i = 0; i < count_; ++i) {
      const bool seen = source_.view(PyList_GET_ITEM(params.ptr(), i), view);
      if (!seen || address(view, param_layouts_ + i * width_) != expected[i]) {
        return false;
      }
    }
    return true;
  }

  // The address of every gradient into a column of the table, rows of `step` elements: 0 for one that is
  // missing or empty, kMismatch for one that no kernel can use as it is. Returns how many there are of the
  // latter and of the former, and whether any address is another one than before.
  std::tuple<int64_t, int64_t, bool> gather(const py::list& params, int64_t column, int64_t step) const {
    check(params);
    auto* out = reinterpret_cast<int64_t*>(column);
    int64_t mismatches = 0;
    int64_t missing = 0;
    bool changed = false;
    py::object held;
    View view;
    for (Py_ssize_t i = 0; i < count_; ++i) {
      const Gradient gradient = source_.gradient(PyList_GET_ITEM(params.ptr(), i), view, held);
      const int64_t found = gradient == Gradient::missing    ? 0
                            : gradient == Gradient::unusable ? kMismatch
                                                             : address(view, grad_layouts_ + i * width_);
      missing += found == 0;
      mismatches += found == kMismatch;
      changed = changed || out[i * step] != found;
      out[i * step] = found;
    }
    return {mismatches, missing, changed};
  }

 private:
  static constexpr int64_t kMismatch = -1;

  void check(const py::list& params) const {
    if (PyList_GET_SIZE(params.ptr()) != count_) {
      throw py::value_error("another number of parameters");
    }
  }

  int64_t address(const View& view, const int64_t* layout) const {
    int64_t numel = 1;
    for (int64_t d = 0; d < view.dim; ++d) {
      numel *= view.sizes[d];
    }
    if (numel == 0) {
      return 0;
    }
    const int64_t dim = layout[0];
    if (view.dtype != like_.dtype || view.dim != dim || view.device_type != like_.device_type ||
        view.device_index != like_.device_index || view.data == nullptr) {
      return kMismatch;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t size = layout[1 + d];
      if (view.sizes[d] != size || (size != 1 && view.strides[d] != layout[1 + dim + d])) {
        return kMismatch;
      }
    }
    return reinterpret_cast<int64_t>(view.data);
  }

  Source source_;
  Py_ssize_t count_;
  const int64_t* param_layouts_;
  const int64_t* grad_layouts_;
  int64_t width_;
  View like_{};
};

}  // namespace sharpkern
