"""Build of the extension sharpkern._C; everything else is in pyproject.toml.

SHARPKERN_EXT=0 leaves the extension out: the package then runs on its plain PyTorch reference.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

# torch/csrc/stable is guaranteed for every torch from this one on: one binary serves them all.
TORCH_TARGET = "0x020a000000000000ULL"
TORCH_MINIMUM = (2, 10)


def extension():
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "sharpkern builds against the torch of your environment and found none in this one.\n"
            "Install torch >= 2.10, then: pip install --no-build-isolation ."
        )
    try:
        import pybind11
    except ImportError:
        sys.exit("sharpkern needs pybind11 to build: pip install setuptools wheel ninja pybind11")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MINIMUM:
        sys.exit(f"sharpkern needs torch >= 2.10 to build, found {torch.__version__}")
    if sys.platform != "win32" and not any(
        shutil.which(c) for c in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++") if c
    ):
        sys.exit("sharpkern found no C++ compiler. Install one, or build without the kernels: SHARPKERN_EXT=0")

    sources = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
    return {
        "ext_modules": [
            CppExtension(
                "sharpkern._C",
                sources,
                include_dirs=[pybind11.get_include()],
                define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
                extra_compile_args=[
                    "-O3",
                    "-std=c++20",
                    "-fopenmp-simd",
                    "-fno-math-errno",
                    "-fvisibility=hidden",
                    "-Wall",
                ],
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(**({} if os.environ.get("SHARPKERN_EXT") == "0" else extension()))
