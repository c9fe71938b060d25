"""The CUDA kernels on a CPU: ``build()`` compiles csrc/cuda against the runtime in this folder, ``load()`` puts
the result in front of the CPU kernels. See cuda_runtime.h for what such a run shows, and what it cannot."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]

_library: ctypes.CDLL | None = None


def compiler() -> list[str] | None:
    """The C++ compiler's command, None where there is none."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def build() -> Path:
    """The shared library with the emulated kernels, compiled unless these very sources were before.

    Raises:
        RuntimeError: with the compiler's words, when it fails.
    """
    from torch.utils.cpp_extension import include_paths  # slow to import

    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler")
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    sources = [*kernels, HERE / "runtime.cpp"]
    headers = [p for folder in ("csrc", "csrc/cuda", "tests/emulation") for p in sorted((ROOT / folder).glob("*.*h"))]
    digest = hashlib.sha256(repr((cxx, FLAGS, torch.__version__, torch.__file__)).encode())
    for path in [*sources, *headers]:
        digest.update(str(path).encode() + path.read_bytes())
    folder = ROOT / "build/emulation" / digest.hexdigest()[:16]
    library = folder / "libsharpkern_emulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{HERE}", *(f"-isystem{path}" for path in include_paths())]

    def run(arguments: list[str]) -> None:
        done = subprocess.run([*cxx, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join([*cxx, *arguments])}\n{done.stdout}{done.stderr}")

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.stem}.{os.getpid()}.o")
        run([*FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = folder / f"{os.getpid()}.so"
    libraries = Path(torch.__file__).parent / "lib"
    # Its own stand-ins for torch's functions are the ones to call.
    run(["-shared", "-Wl,-Bsymbolic", *objects, "-o", str(unfinished), f"-L{libraries}", "-ltorch_cpu"])
    unfinished.replace(library)
    for path in objects:
        Path(path).unlink()
    return library


def load(library: str | Path) -> None:
    """Make the emulated kernels those of the backend "cpp", for the rest of this process."""
    global _library
    torch.ops.load_library(str(library))
    _library = ctypes.CDLL(str(library))


def launches() -> int:
    """Kernels launched so far."""
    assert _library is not None
    count: int = _library.emulation_launches()
    return count


def overlap() -> tuple[bool, bool]:
    """Whether the last launch may start before the one ahead is complete, and whether it lets the next one do so."""
    assert _library is not None
    found: int = _library.emulation_overlap()
    return bool(found & 1), bool(found & 2)


def configure(seed: int = 0, multiprocessors: int = 3) -> None:
    """In which random order threads and blocks run from now on, and for how many blocks there is room."""
    assert _library is not None
    _library.emulation_configure(ctypes.c_uint(seed), ctypes.c_int(multiprocessors))


def accesses(call: Callable[[], object]) -> torch.Tensor:
    """What a call's threads load and store of the arrays that they walk, each in its order: int64 rows of block,
    thread, address, bytes."""
    assert _library is not None
    _library.emulation_record.restype = ctypes.c_int64
    _library.emulation_accesses.restype = ctypes.c_void_p
    _library.emulation_record(True)
    try:
        call()
    finally:
        count = _library.emulation_record(False)
    array = (ctypes.c_int64 * (4 * count)).from_address(_library.emulation_accesses())
    return torch.frombuffer(array, dtype=torch.int64).view(count, 4).clone()
