"""Build of the extension sharpkern._C; everything else is in pyproject.toml.

SHARPKERN_EXT=0 leaves the extension out: the package then runs on its plain PyTorch reference.
SHARPKERN_ATEN=0 leaves out the part of it that is of one version of torch: the host takes longer for many tensors.
SHARPKERN_CUDA=0 leaves the CUDA kernels out, SHARPKERN_CUDA=1 insists on them; otherwise they are built where
nvcc is found (CUDA_HOME, CUDA_PATH, or on the PATH). TORCH_CUDA_ARCH_LIST names other architectures, as numbers.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

# torch/csrc/stable is guaranteed for every torch from this one on: one binary serves them all.
TORCH_TARGET = "0x020a000000000000ULL"
TORCH_MINIMUM = (2, 10)

# A100, H100, B200; what is newer compiles the last one's PTX.
ARCHITECTURES = ["8.0", "9.0", "10.0"]


class Toolkit:
    """nvcc, and what it compiles for. torch's BuildExtension compiles CUDA only against a torch that has CUDA."""

    def __init__(self, nvcc):
        self.nvcc = nvcc
        words = self._ask("--version")
        self.version = re.search(r"release (\d+\.\d+)", words)[1]
        # nvcc may be a script somewhere else: it knows where it belongs.
        self.root = Path(re.search(r"^#\$ TOP=(.*)$", self._ask("--dryrun", "-x", "cu", "none"), re.MULTILINE)[1])
        known = re.findall(r"compute_(\w+)", self._ask("--list-gpu-arch"))
        wanted = list(filter(None, re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))))
        for name in wanted:
            number = re.fullmatch(r"(\d+\.\d+)[af]?(\+PTX)?", name)
            if number is None or number[1].replace(".", "") not in known:
                problem = f"nvcc {self.version} does not compile for {name!r} (from TORCH_CUDA_ARCH_LIST)"
                if os.environ.get("SHARPKERN_CUDA") == "1":
                    sys.exit(f"SHARPKERN_CUDA=1, but {problem}")
                print(f"sharpkern: building for the default architectures, because {problem}", file=sys.stderr)
                wanted = []
                break
        if not wanted:
            wanted = [name for name in ARCHITECTURES if name.replace(".", "") in known] or [
                f"{known[-1][:-1]}.{known[-1][-1]}"
            ]
            wanted[-1] += "+PTX"
        self.architectures = wanted

    def _ask(self, *arguments):
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    @property
    def flags(self):
        flags = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for name in self.architectures:
            number = name.removesuffix("+PTX").replace(".", "")
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if name.endswith("+PTX"):
                flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        return flags

    @property
    def libraries(self):
        """Where the static runtime is. Linked in, it needs no CUDA on the machine that imports the extension."""
        folders = [self.root / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
        found = [str(folder.resolve()) for folder in folders if (folder / "libcudart_static.a").exists()]
        if not found:
            sys.exit(f"sharpkern: no libcudart_static.a below {self.root}. Build without CUDA: SHARPKERN_CUDA=0")
        return found[:1]


def find_toolkit(torch):
    """The CUDA toolkit to build with, or None. Whether this machine has a GPU does not matter."""
    wish = os.environ.get("SHARPKERN_CUDA", "")
    if wish == "0" or (torch.version.hip and wish != "1"):
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = next((path for home in homes if home and (path := shutil.which("nvcc", path=f"{home}/bin"))), None)
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None or not sys.platform.startswith("linux"):
        if wish == "1":
            sys.exit("SHARPKERN_CUDA=1, but sharpkern found no nvcc: set CUDA_HOME, or put it on the PATH (Linux)")
        return None
    toolkit = Toolkit(nvcc)
    theirs = torch.version.cuda
    if theirs and theirs.split(".")[0] != toolkit.version.split(".")[0]:
        problem = f"nvcc is of CUDA {toolkit.version}, torch of CUDA {theirs}"
        if wish == "1":
            sys.exit(f"SHARPKERN_CUDA=1, but {problem}: set CUDA_HOME to a toolkit of torch's")
        print(f"sharpkern: building without CUDA kernels, because {problem}", file=sys.stderr)
        return None
    return toolkit


def compile_cuda(toolkit, folder, include_dirs):
    """Objects of csrc/cuda, compiled side by side where they are older than any source."""
    newest = max(path.stat().st_mtime for path in [Path(__file__), *Path("csrc").rglob("*.*")])
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        # Named by the architectures too: other ones are other objects.
        out = folder / "-".join([source.stem, toolkit.version, *toolkit.architectures, "cuda.o"])
        if out.exists() and out.stat().st_mtime > newest:
            return str(out)
        includes = [f"-I{path}" for path in include_dirs]
        define = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
        unfinished = out.with_suffix(f".{os.getpid()}")
        command = [toolkit.nvcc, *toolkit.flags, define, *includes, "-c", str(source), "-o", str(unfinished)]
        print(*command, flush=True)
        if subprocess.run(command).returncode:
            unfinished.unlink(missing_ok=True)
            sys.exit(f"sharpkern: nvcc could not compile {source}. Build without CUDA: SHARPKERN_CUDA=0")
        unfinished.replace(out)
        return str(out)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        return list(pool.map(compile_one, sorted(Path("csrc/cuda").glob("*.cu"))))


def extension():
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
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

    toolkit = find_toolkit(torch)

    def compiled(name, folders, macro):
        return CppExtension(
            name,
            sorted(str(path) for folder in folders for path in Path(folder).glob("*.cpp")),
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.*"))],
            include_dirs=[pybind11.get_include()],
            define_macros=[macro],
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fopenmp-simd",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-Wall",
            ],
        )

    built = compiled("sharpkern._C", ["csrc", "csrc/cpu"], ("TORCH_TARGET_VERSION", TORCH_TARGET))
    # By torch's C++ classes, which have no stable ABI: it is used with this very torch, and may be left out.
    of_this_torch = f'"{torch.__version__} {torch.version.git_version}"'
    helper = compiled("sharpkern._aten", ["csrc/aten"], ("SHARPKERN_TORCH_VERSION", of_this_torch))
    helper.optional = True
    if toolkit is not None:
        built.define_macros += [
            ("SHARPKERN_CUDA_VERSION", f'"{toolkit.version}"'),
            ("SHARPKERN_CUDA_ARCHITECTURES", f'"{" ".join(toolkit.architectures)}"'),
        ]
        built.library_dirs += toolkit.libraries
        # torch has its own CUDA runtime in the global scope: without exclude-libs its functions would take
        # the place of these, whatever their version.
        # And libtorch.so, of which nothing is used directly, leads to libtorch_cuda.so where torch has one.
        built.extra_link_args += [
            "-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,libcudart_static.a",
            "-Wl,--no-as-needed", "-ltorch",
        ]  # fmt: skip

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:
                self.build_temp = "build/editable"  # else a new folder every time, and all is compiled anew

        def build_extensions(self):
            if toolkit is not None:
                built.extra_objects += compile_cuda(toolkit, Path(self.build_temp) / "csrc/cuda", include_paths())
            super().build_extensions()

        def build_extension(self, extension):
            if extension is not helper:
                return super().build_extension(extension)
            # One that was built for another torch, or is not wanted, must not stay.
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            if os.environ.get("SHARPKERN_ATEN") == "0":
                return
            self.force = True
            try:
                super().build_extension(extension)
            except Exception as error:
                print(f"sharpkern: building without sharpkern._aten, which this torch does not compile: {error}")

        def copy_extensions_to_source(self):
            Path("sharpkern", self.get_ext_filename("_aten")).unlink(missing_ok=True)
            super().copy_extensions_to_source()

    return {"ext_modules": [built, helper], "cmdclass": {"build_ext": Build}}


setup(**({} if os.environ.get("SHARPKERN_EXT") == "0" else extension()))
