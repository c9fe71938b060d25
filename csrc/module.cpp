// The Python module _C: importing it registers the kernels; it tells how they were built, and finds tensors.
#include <pybind11/pybind11.h>

#include <string>

#include <torch/headeronly/version.h>

// setup.py says with which toolkit and for what the kernels of csrc/cuda were compiled.
#ifndef SHARPKERN_CUDA_VERSION
#define SHARPKERN_CUDA_VERSION ""
#define SHARPKERN_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace sharpkern {
void define_lists(py::module_& m);
void define_scan(py::module_& m);
}  // namespace sharpkern

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sharpkern; importing the module registers them with torch.";
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#else
    info["compiler"] = "unknown";
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
    info["cpu"] = "x86-64-v4, x86-64-v3, x86-64";
#else
    info["cpu"] = "baseline";
#endif
    info["torch"] = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
                    std::to_string(TORCH_VERSION_PATCH);
    info["cuda"] = SHARPKERN_CUDA_VERSION;
    info["cuda_architectures"] = SHARPKERN_CUDA_ARCHITECTURES;
    return info;
  });
  sharpkern::define_lists(m);
  sharpkern::define_scan(m);
}
