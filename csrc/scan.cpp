// Tensors seen through DLPack's exchange table, whose structures are DLPack's stable
// ABI, version 1; a torch without it takes the op gather.
#include "scan.h"

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
struct Tensor {  // DLTensor
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
  int (*view)(void* tensor, Tensor* out);
  void* stream;
};

class Dlpack {
 public:
  Dlpack(const py::capsule& exchange, py::handle like)
      : exact_(Py_TYPE(like.ptr())), is_neg_(py::type::handle_of(like).attr("is_neg")) {
    const Exchange* table = exchange.get_pointer<Exchange>();
    while (table != nullptr && table->version.major != 1) {
      table = table->previous;
    }
    if (table == nullptr || table->view == nullptr) {
      throw py::value_error("no function of DLPack's version 1 to look at a tensor");
    }
    view_ = table->view;
  }

  bool view(PyObject* tensor, View& out) const {
    Tensor found;
    if (view_(tensor, &found) != 0) {  // sparse, say
      PyErr_Clear();
      return false;
    }
    void* data = found.data == nullptr ? nullptr : static_cast<char*>(found.data) + found.offset;
    const int32_t dtype = found.dtype.code << 8 | found.dtype.bits;
    out = {data, found.device.type, found.device.index, dtype, found.ndim, found.sizes, found.strides};
    return true;
  }

  Gradient gradient(PyObject* param, View& out, py::object& held) const {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    held = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, name));
    if (!held) {
      throw py::error_already_set();
    }
    PyObject* grad = held.ptr();
    if (grad == Py_None) {
      return Gradient::missing;
    }
    const bool seen = Py_TYPE(grad) == exact_ && !is_negated(grad) && view(grad, out);
    return seen ? Gradient::seen : Gradient::unusable;
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

  PyTypeObject* exact_;
  py::object is_neg_;
  int (*view_)(void*, Tensor*) = nullptr;
};

}  // namespace

void define_scan(py::module_& m) {
  using Scanner = Scan<Dlpack>;
  py::class_<Scanner>(
      m, "Scan", "Parameters of one layout: whether they have moved, and where their gradients are.")
      .def(
          py::init([](const py::capsule& exchange, Py_ssize_t count, py::handle like, int64_t param_layouts,
                      int64_t grad_layouts, int64_t width) {
            return Scanner(Dlpack(exchange, like), count, like, param_layouts, grad_layouts, width);
          }))
      .def("unmoved", &Scanner::unmoved)
      .def("gather", &Scanner::gather);
}

}  // namespace sharpkern
