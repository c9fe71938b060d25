// What every step asks of the optimizer's lists and dictionaries, without a Python object for each answer.
#include <pybind11/pybind11.h>

#include <algorithm>

namespace py = pybind11;

namespace sharpkern {
namespace {

// Whether two lists, or tuples, hold the same objects in the same order.
bool identical(const py::object& one, const py::object& other) {
  const auto a = py::reinterpret_steal<py::object>(PySequence_Fast(one.ptr(), "expected a list"));
  const auto b = py::reinterpret_steal<py::object>(PySequence_Fast(other.ptr(), "expected a list"));
  if (!a || !b) {
    throw py::error_already_set();
  }
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(a.ptr());
  PyObject** items = PySequence_Fast_ITEMS(a.ptr());
  return n == PySequence_Fast_GET_SIZE(b.ptr()) &&
         std::equal(items, items + n, PySequence_Fast_ITEMS(b.ptr()));
}

// How many entries the dictionaries have that are values of this one; what is none counts as one without any.
int64_t count_entries(const py::dict& state) {
  int64_t count = 0;
  Py_ssize_t at = 0;
  PyObject* value = nullptr;
  while (PyDict_Next(state.ptr(), &at, nullptr, &value)) {
    count += PyDict_Check(value) ? PyDict_Size(value) : 0;
  }
  return count;
}

}  // namespace

void define_lists(py::module_& m) {
  m.def("identical", &identical);
  m.def("count_entries", &count_entries);
}

}  // namespace sharpkern
