// The Python module _aten: what the host does to every tensor of a step, by torch's own C++ classes. These
// have no stable ABI, so that it is used with the very torch it was built against, and the package does
// without it elsewhere.
#include <torch/csrc/autograd/python_variable.h>

#include "../scan.h"

namespace sharpkern {
namespace {

struct Aten {
  static bool view(const at::Tensor& tensor, View& out) {
    c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    // Neither a wrapper, nor one whose memory holds the negative of it.
    if (impl->layout() != c10::kStrided || !impl->has_storage() || impl->is_neg() ||
        impl->is_python_dispatch()) {
      return false;
    }
    auto* data = static_cast<char*>(impl->unsafe_storage().mutable_data());
    if (data != nullptr) {
      data += impl->storage_offset() * static_cast<int64_t>(impl->itemsize());
    }
    const c10::Device device = impl->device();
    out = {
        data,
        static_cast<int32_t>(device.type()),
        device.index(),
        static_cast<int32_t>(tensor.scalar_type()),
        impl->dim(),
        impl->sizes().data(),
        impl->strides().data()};
    return true;
  }

  static bool view(PyObject* tensor, View& out) {
    return THPVariable_Check(tensor) && view(THPVariable_Unpack(tensor), out);
  }

  static Gradient gradient(PyObject* param, View& out, py::object&) {
    if (!THPVariable_Check(param)) {
      throw py::type_error("parameters should be tensors");
    }
    const at::Tensor& grad = THPVariable_Unpack(param).grad();
    if (!grad.defined()) {
      return Gradient::missing;
    }
    return view(grad, out) ? Gradient::seen : Gradient::unusable;
  }
};

// torch.autograd.graph.increment_version; inference tensors have none.
void increment_version(const py::list& tensors) {
  for (const py::handle tensor : tensors) {
    if (!THPVariable_Check(tensor.ptr())) {
      throw py::type_error("increment_version expects tensors");
    }
    const at::Tensor& found = THPVariable_Unpack(tensor.ptr());
    if (!found.is_inference()) {
      found.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace

PYBIND11_MODULE(_aten, m) {
  m.doc() = "Where tensors lie, for the torch of this version alone.";
  m.attr("torch_version") = SHARPKERN_TORCH_VERSION;
  m.def("increment_version", &increment_version);
  using Scanner = Scan<Aten>;
  py::class_<Scanner>(
      m, "Scan", "Parameters of one layout: whether they have moved, and where their gradients are.")
      .def(
          py::init(
              [](Py_ssize_t count, py::handle like, int64_t param_layouts, int64_t grad_layouts,
                 int64_t width) { return Scanner(Aten(), count, like, param_layouts, grad_layouts, width); }))
      .def("unmoved", &Scanner::unmoved)
      .def("gather", &Scanner::gather);
}

}  // namespace sharpkern
