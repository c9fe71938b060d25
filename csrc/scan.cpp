// Where parameters and gradients lie, asked of the Python tensors themselves: no list of tensors goes through
// the dispatcher, and none is made. Through DLPack's exchange table (torch 2.11 and later), whose structures
// are DLPack's stable ABI, version 1; a torch without it takes the op gather.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

namespace py = pybind11;

namespace sharpkern {
namespace {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {  // DLTensor: borrowed, strides in elements
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;
  uint64_t offset;
};
struct Exchange {  // DLPackExchangeAPI
  Version version;
  Exchange* previous;
  void* functions[3];
  int (*view)(void* tensor, View* out);
  void* stream;
};

constexpr int64_t kMismatch = -1;

// The parameters of one layout. Addresses of the host's int64 tensors, which outlive it: how each parameter
// lies, how its gradient has to, a row [dim, sizes..., strides...] of `width` each.
class Scan {
 public:
  Scan(
      const py::capsule& exchange, py::list params, py::handle like, int64_t param_layouts,
      int64_t grad_layouts, int64_t width)
      : params_(std::move(params)),
        param_layouts_(reinterpret_cast<const int64_t*>(param_layouts)),
        grad_layouts_(reinterpret_cast<const int64_t*>(grad_layouts)),
        width_(width),
        exact_(Py_TYPE(like.ptr())),
        is_neg_(py::type::handle_of(like).attr("is_neg")) {
    const Exchange* table = exchange.get_pointer<Exchange>();
    while (table != nullptr && table->version.major != 1) {
      table = table->previous;
    }
    if (table == nullptr || table->view == nullptr) {
      throw py::value_error("no function of DLPack's version 1 to look at a tensor");
    }
    view_ = table->view;
    if (view_(like.ptr(), &like_) != 0) {
      throw py::error_already_set();
    }
  }

  // Whether every parameter is where `addresses` says, of the dtype, the device and the layout that it had.
  bool unmoved(int64_t addresses) const {
    const auto* expected = reinterpret_cast<const int64_t*>(addresses);
    const Py_ssize_t n = PyList_GET_SIZE(params_.ptr());
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (address(PyList_GET_ITEM(params_.ptr(), i), param_layouts_ + i * width_) != expected[i]) {
        return false;
      }
    }
    return true;
  }

  // The address of every gradient into a column of the table, rows of `step` elements: 0 for one that is
  // missing or empty, kMismatch for one that no kernel can use as it is. Returns how many there are of the
  // latter and of the former, and whether any address is another one than before.
  std::tuple<int64_t, int64_t, bool> gather(int64_t column, int64_t step) const {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    auto* out = reinterpret_cast<int64_t*>(column);
    int64_t mismatches = 0;
    int64_t missing = 0;
    bool changed = false;
    const Py_ssize_t n = PyList_GET_SIZE(params_.ptr());
    for (Py_ssize_t i = 0; i < n; ++i) {
      const auto grad =
          py::reinterpret_steal<py::object>(PyObject_GetAttr(PyList_GET_ITEM(params_.ptr(), i), name));
      if (!grad) {
        throw py::error_already_set();
      }
      int64_t found = 0;
      if (!grad.is_none()) {
        const bool plain = Py_TYPE(grad.ptr()) == exact_ && !is_negated(grad.ptr());
        found = plain ? address(grad.ptr(), grad_layouts_ + i * width_) : kMismatch;
      }
      missing += found == 0;
      mismatches += found == kMismatch;
      changed = changed || out[i * step] != found;
      out[i * step] = found;
    }
    return {mismatches, missing, changed};
  }

 private:
  // Whether its memory holds the negative of it: DLPack does not say.
  bool is_negated(PyObject* tensor) const {
    const auto answer =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), &tensor, 1, nullptr));
    if (!answer) {
      throw py::error_already_set();
    }
    return answer.ptr() == Py_True;
  }

  int64_t address(PyObject* tensor, const int64_t* layout) const {
    View view;
    if (view_(tensor, &view) != 0) {  // sparse, say
      PyErr_Clear();
      return kMismatch;
    }
    const int64_t dim = layout[0];
    int64_t numel = 1;
    for (int32_t d = 0; d < view.ndim; ++d) {
      numel *= view.sizes[d];
    }
    if (numel == 0) {
      return 0;
    }
    if (view.dtype.code != like_.dtype.code || view.dtype.bits != like_.dtype.bits || view.ndim != dim ||
        view.device.type != like_.device.type || view.device.index != like_.device.index ||
        view.data == nullptr) {
      return kMismatch;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t size = layout[1 + d];
      if (view.sizes[d] != size || (size != 1 && view.strides[d] != layout[1 + dim + d])) {
        return kMismatch;
      }
    }
    return reinterpret_cast<int64_t>(view.data) + static_cast<int64_t>(view.offset);
  }

  py::list params_;
  const int64_t* param_layouts_;
  const int64_t* grad_layouts_;
  int64_t width_;
  PyTypeObject* exact_;
  py::object is_neg_;
  int (*view_)(void*, View*) = nullptr;
  View like_{};
};

}  // namespace

void define_scan(py::module_& m) {
  py::class_<Scan>(
      m, "Scan", "Parameters of one layout: whether they have moved, and where their gradients are.")
      .def(py::init<py::capsule, py::list, py::handle, int64_t, int64_t, int64_t>())
      .def("unmoved", &Scan::unmoved)
      .def("gather", &Scan::gather);
}

}  // namespace sharpkern
