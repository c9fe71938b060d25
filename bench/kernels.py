"""``python -m bench.kernels``: what the compilers make of every kernel; nothing is run, and no GPU is needed.

Every Triton kernel, launched as the ops launch it, is compiled ahead of time for NVIDIA's sm_80, sm_90 and sm_100
and AMD's gfx942; every file of csrc/cuda by nvcc, with the flags of setup.py, for the same targets of NVIDIA's.
The exit status is 1 where one of these is broken:

- nothing is spilled, no thread has a stack. (On AMD ``sspills``, scalar registers that wait in lanes of a vector
  register, are only shown: they cost instructions, but no memory, or there would be a stack.)
- the widest loads and stores of global memory move 16 bytes: those of whole, aligned blocks. There must be one for
  each array that a block loads or stores, since a few scalars side by side may make a wide access too. In Triton
  half-precision parameters beside float32 state may be narrower than that state (see ``walk.options``).
  ``16 x8``: the widest is 16 bytes, eight instructions.
- there is no op, and no kernel, of sharpkern.ops.triton that is not launched here.

``shared`` has the static and the dynamic bytes, and from sm_90 on the KiB that the driver takes of those who use any.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
CUBINS = ROOT / "build/kernels"
JOBS = min(2, os.cpu_count() or 1)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "float64", "bfloat16", "float16")
WIDE = 16  # bytes

# The arrays that a block loads, and those that it stores, by their names in the schemas.
ARRAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "norm": (("grads",), ()),
    "norm_scaled": (("params", "grads"), ()),
    "norm_ema": (("grads",), ()),
    "dots": (("gradient", "grads"), ()),
    "project": (("gradient", "grads"), ("g_v",)),
    "ascend": (("params", "grads"), ("params", "backup", "gradient")),
    "ascend_scaled": (("params", "grads"), ("params", "backup")),
    "restore": (("backup",), ("params",)),
    "sgd": (("params", "grads", "g_v", "momentum_buffer"), ("params", "momentum_buffer")),
    "adam": (
        ("params", "grads", "g_v", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        ("params", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
}
# Those in the dtype of the parameters; the others are state.
OF_PARAMETERS = {"params", "grads", "backup", "gradient"}


# What a compiler made, and what is asked of it.


@dataclass(frozen=True)
class Access:
    """The widest of some instructions: bytes, and how many are so wide."""

    bytes: int = 0
    count: int = 0

    def __str__(self) -> str:
        return f"{self.bytes} x{self.count}" if self.count else "-"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a target."""

    registers: int
    spills: int  # NVIDIA: instructions that access local memory; AMD: vector registers
    scalar_spills: int
    stack: int  # bytes a thread; AMD's scratch
    shared: int  # bytes
    load: Access
    store: Access


@dataclass(frozen=True)
class Row:
    """A line of the report."""

    language: str
    kernel: str
    dtype: str
    target: str
    usage: Usage
    loads: int = 1  # how many wide ones it has at least
    stores: int = 1

    def __str__(self) -> str:
        return f"{self.language} {self.kernel} {self.dtype} {self.target}"

    def broken(self) -> list[str]:
        """The rules that it breaks."""
        usage, rules = self.usage, []
        if usage.spills:
            rules.append(f"spills {usage.spills}")
        if usage.stack:
            rules.append(f"has a stack of {usage.stack} bytes")
        for what, access, least in (("load", usage.load, self.loads), ("store", usage.store, self.stores)):
            if least and access.bytes < WIDE:
                rules.append(f"{what}s {access.bytes} bytes at most")
            elif access.count < least:
                rules.append(f"has {access.count} {what}s of {access.bytes} bytes for {least} arrays")
        return [f"{self} {rule}" for rule in rules]


# Rows, and what went wrong.
Result = tuple[list[Row], list[str]]


def one_line(error: Exception) -> str:
    """Its name, and the first line that a compiler called fatal, or an error, or else the last one."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason was given"]
    telling = [line for word in ("fatal", "error") for line in lines if re.search(rf"\b{word} *:", line)]
    return f"{type(error).__name__}: {(telling or lines[-1:])[0].strip()}"


def widest(widths: Sequence[int]) -> Access:
    """The widest of these, and how many there are of it."""
    return Access(max(widths), widths.count(max(widths))) if widths else Access()


# NVIDIA's machine code.

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# After the address and perhaps a predicate. LD and ST are those whose address only the running kernel knows to be
# global memory's; LDS and STS, shared memory's, are none of these.
_SASS = re.compile(r"\*/\s+(?:@!?\w+ )?(LDG|LD|STG|ST|LDL|STL)((?:\.\w+)*) ")
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def read_sass(text: str) -> tuple[Access, Access, int]:
    """(widest load, widest store, accesses to local memory) in one function's ``cuobjdump -sass``."""
    widths: dict[str, list[int]] = {"LD": [], "ST": []}
    local = 0
    for name, modifiers in _SASS.findall(text):
        if name.endswith("L"):
            local += 1
        else:
            width = (_SASS_BYTES[m] for m in modifiers.split(".") if m in _SASS_BYTES)
            widths[name[:2]].append(next(width, 4))
    return widest(widths["LD"]), widest(widths["ST"]), local


def read_cubin(resources: str, sass: str) -> dict[str, Usage]:
    """Of every function, from ``cuobjdump -res-usage`` and ``-sass``."""
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
    functions = {}
    for name, *numbers in _RESOURCES.findall(resources):
        registers, stack, shared, local_bytes = map(int, numbers)
        load, store, local = read_sass(code[name])
        functions[name] = Usage(registers, local, 0, max(stack, local_bytes), shared, load, store)
    return functions


def find_cuobjdump() -> str | None:
    """Triton brings one; so do most CUDA toolkits."""
    triton = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or []]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders)) or shutil.which("cuobjdump")


def inspect_cubin(path: Path) -> dict[str, Usage]:
    """Of every function in a cubin."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("there is no cuobjdump to read it with: install triton, or put CUDA's on the PATH")
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    return read_cubin(*(run([cuobjdump, option, path]).stdout for option in ("-res-usage", "-sass")))


# AMD's assembly.

_AMD = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def _amd_bytes(suffix: str) -> int:
    if words := re.fullmatch(r"dwordx(\d)", suffix):
        return 4 * int(words[1])
    if bits := re.fullmatch(r"[a-z]+(\d+)", suffix):
        return int(bits[1]) // 8
    return _AMD_BYTES.get(suffix.split("_")[0], 2)  # the rest are halves of registers, such as short_d16_hi


def read_amdgcn(text: str) -> Usage:
    """Of the one kernel in an assembly file."""

    def number(name: str) -> int:
        found = re.search(rf"^ *-? *\.{name}: +(\d+)$", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the assembly does not tell its {name}")
        return int(found[1])

    widths: dict[str, list[int]] = {"load": [], "store": []}
    for kind, suffix in _AMD.findall(text):
        widths[kind].append(_amd_bytes(suffix))
    return Usage(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        scalar_spills=number("sgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        shared=number("group_segment_fixed_size"),
        load=widest(widths["load"]),
        store=widest(widths["store"]),
    )


# The Triton half.


@dataclass(frozen=True)
class Case:
    """How an op is called: the flat buffers that are empty, and the rest as in a step of SAM, or otherwise."""

    op: str
    without: tuple[str, ...] = ()
    in_sam: bool = True


_OTHERWISE = ("backup", "counters")
CASES = {
    "norm": Case("norm"),
    "norm_scaled": Case("norm_scaled"),
    "norm_ema": Case("norm_ema"),
    "norm_ema, two buffers": Case("norm_ema", in_sam=False),
    "dots": Case("dots"),
    "project": Case("project"),
    "ascend": Case("ascend", ("gradient",)),
    "ascend, gradient kept": Case("ascend"),
    "ascend, in place": Case("ascend", ("backup", "gradient")),
    "ascend, in place, gradient kept": Case("ascend", ("backup",)),
    "ascend, unchecked": Case("ascend", ("gradient", "counters"), in_sam=False),
    "ascend_scaled": Case("ascend_scaled"),
    "restore": Case("restore"),
    "sgd": Case("sgd", ("g_v",)),
    "sgd, no momentum": Case("sgd", ("g_v", "momentum_buffer")),
    "sgd, mixed": Case("sgd"),
    "sgd, mixed, no momentum": Case("sgd", ("momentum_buffer",)),
    "adam": Case("adam", ("g_v", "max_exp_avg_sq")),
    "adam, amsgrad": Case("adam", ("g_v",)),
    "adam, mixed": Case("adam", ("max_exp_avg_sq",)),
    "adam, mixed, amsgrad": Case("adam"),
    # In place nothing is copied from a backup: no wide copy can hide a narrow update.
    "sgd, in place": Case("sgd", ("g_v", *_OTHERWISE), in_sam=False),
    "sgd, mixed, in place": Case("sgd", _OTHERWISE, in_sam=False),
    "adam, in place": Case("adam", ("g_v", "max_exp_avg_sq", *_OTHERWISE), in_sam=False),
    "adam, mixed, in place": Case("adam", ("max_exp_avg_sq", *_OTHERWISE), in_sam=False),
}


def arguments(case: Case, dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an op like those that the optimizers have for it on a device, by the names in its schema."""
    import torch

    from sharpkern.ops import schema

    rows, doubles = 3, partial(torch.zeros, dtype=torch.float64)
    table = torch.zeros(schema.COLUMNS, rows, dtype=torch.int64).t()  # as on a device: column after column
    squares = doubles(2, 1)
    if not case.in_sam:
        table, squares = table.contiguous(), doubles(1, 2)
    elif case.op.startswith("ascend"):
        squares = squares[:1]
    # The squared norm of a second pass lies behind that of the first one; dots writes a column of a matrix.
    written = {"norm_ema": squares[-1], "dots": doubles(3, 1)[1:, 0]}
    known = {
        "params": [],
        "grads": [],
        "table": table,
        "blocks": torch.zeros(rows, 2, dtype=torch.int32),
        **{name: torch.zeros(schema.BLOCK, dtype=dtype) for name in ("backup", "gradient")},
        "step": torch.zeros(rows),
        "counters": torch.zeros(3, dtype=torch.int64),
        "partials": doubles(schema.partials_size(schema.BLOCK, rows)),
        "radius": doubles(1, 2),
        "values": doubles(1, len(getattr(schema, case.op.upper(), ()))),
        "products": doubles(3, 1),
        "ema": doubles(len(schema.EMA)),
        "sq": written.get(case.op, squares[-1, -1]) if "partials" in schema.SCHEMAS[case.op] else squares,
        "g_v_sq": squares[:1],
        "buffer": 0,
        "decay": 0.9,
        "coefficient": 1.0,
        "alpha": 0.7,
        "eps": 1e-12,
        "max_norm": 1.0,
        "skip_nonfinite": case.in_sam,
        "dtype": dtype,
    }
    positional, named = [], {}
    for argument in getattr(torch.ops.sharpkern, case.op).default._schema.arguments:
        # Whatever has no name above is state.
        value = known.get(argument.name, torch.zeros(schema.BLOCK, dtype=schema.state_dtype(dtype)))
        if argument.name in case.without:
            value = value[:0]
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    return positional, named


@contextmanager
def instead_of_launching(backend: str, run: Callable[..., object]) -> Iterator[None]:
    """Whatever an op launches goes to ``run``, with the options for one of Triton's backends."""
    from triton.runtime.jit import JITFunction

    from sharpkern.ops.triton import walk

    def options(device_type: str, *args: Any) -> dict[str, Any]:
        return walk.options(backend, *args)

    with mock.patch.object(walk, "_options", options), mock.patch.object(JITFunction, "run", run):
        yield


def call(case: Case, dtype: str) -> None:
    """Run a case on the CPU; its launches had better go elsewhere."""
    import torch

    from sharpkern.ops import triton

    args, kwargs = arguments(case, getattr(torch, dtype))
    triton.IMPLEMENTATIONS[case.op](*args, **kwargs)


def uncovered() -> list[str]:
    """Ops and kernels of sharpkern.ops.triton that no case launches."""
    from triton.runtime.jit import JITFunction

    from sharpkern.ops import triton

    launched = set()

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(kernel.__name__)

    with instead_of_launching("cuda", run):
        for case in CASES.values():
            if case.op in triton.IMPLEMENTATIONS:
                call(case, "float32")
    kernels = set()
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel"):
                if not isinstance(value, JITFunction):
                    raise RuntimeError(f"{name} is not compiled in this process: TRITON_INTERPRET was set too early")
                kernels.add(name)
    ops = triton.IMPLEMENTATIONS.keys() - {case.op for case in CASES.values()}
    return [f"triton {name} is not in the report: bench/kernels.py has no case of it" for name in sorted(ops)] + [
        f"triton {name} is not in the report: no case launches it" for name in sorted(kernels - launched)
    ]


class Driver:
    """In place of the driver of a GPU: Triton asks it only what to compile for."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        else:
            self.target = GPUTarget("hip", target, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # JIT functions keep what they compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_case(name: str, dtype: str, target: str) -> Row:
    """Compile the kernel that a case launches, through the same specialization as a launch on a device."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    mine = Driver(target)
    driver.set_active(mine)
    compiled = []
    compile_or_launch = JITFunction.run

    def run(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(compile_or_launch(kernel, *args, warmup=True, **kwargs))

    with instead_of_launching(mine.target.backend, run):
        call(CASES[name], dtype)
    (kernel,) = compiled  # an op is one launch
    if "amdgcn" in kernel.asm:
        usage = read_amdgcn(kernel.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(kernel.asm["cubin"])
            (usage,) = inspect_cubin(path).values()
    usage = Usage(**{**vars(usage), "shared": usage.shared + kernel.metadata.shared})
    return Row("triton", name, dtype, target, usage, *wide_accesses(CASES[name], dtype))


def wide_accesses(case: Case, dtype: str) -> tuple[int, int]:
    """How many wide loads, and stores, its Triton kernel has at least."""
    loads, stores = (set(names) - set(case.without) for names in ARRAYS[case.op])
    state = (loads | stores) - OF_PARAMETERS
    if state and dtype.endswith("float16"):
        return len(loads & state), len(stores & state)
    return len(loads), len(stores)


def triton_job(job: tuple[str, str, str]) -> Result:
    """``compile_case``; an exception is one line of the report."""
    try:
        return [compile_case(*job)], []
    except Exception as error:
        return [], [f"triton {' '.join(job)} was not compiled: {one_line(error)}"]


def triton_half(targets: Sequence[str], wanted: Callable[[str], bool]) -> Result:
    """Every case, for every dtype and target."""
    jobs = [
        (name, dtype, target)
        for name, case in CASES.items()
        if wanted(case.op)
        for target in targets
        for dtype in DTYPES
    ]
    # Triton has one driver in a process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(JOBS, context) as pool:
        rows, problems = run_all(pool, triton_job, jobs, "Triton kernels")
    return rows, [*uncovered(), *problems]


# The CUDA half.


@cache
def load_setup() -> Any:
    """setup.py as a module: it has the flags and knows how to find nvcc."""
    spec = importlib.util.spec_from_file_location("sharpkern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, SHARPKERN_EXT="0"):
        spec.loader.exec_module(module)
    return module


def find_toolkit() -> Any:
    """setup.py's own, or None. Nothing is linked, so torch may be of another CUDA."""
    any_torch = SimpleNamespace(version=SimpleNamespace(cuda=None, hip=None))
    with mock.patch.dict(os.environ):
        for name in ("SHARPKERN_CUDA", "TORCH_CUDA_ARCH_LIST"):
            os.environ.pop(name, None)
        return load_setup().find_toolkit(any_torch)


def nvcc_command(toolkit: Any, target: str, source: Path, out: Path) -> list[str]:
    """What setup.py runs, but for one architecture, and down to machine code."""
    from torch.utils.cpp_extension import include_paths

    toolkit = copy.copy(toolkit)
    toolkit.architectures = [re.sub(r"sm_(\d+)(\d)", r"\1.\2", target)]
    define = f"-DTORCH_TARGET_VERSION={load_setup().TORCH_TARGET}"
    includes = [f"-I{path}" for path in include_paths()]
    return [toolkit.nvcc, *toolkit.flags, define, *includes, "-cubin", str(source), "-o", str(out)]


def compile_cubin(toolkit: Any, target: str, source: Path) -> Path:
    """Where the cubin is; made anew when the compiler, its flags, torch or a source changed."""
    import torch

    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    words = [toolkit.version, torch.__version__, *nvcc_command(toolkit, target, source, Path("out"))]
    digest = hashlib.sha256("\n".join(words).encode())
    for path in (source, *headers):
        digest.update(path.read_bytes())
    out = CUBINS / f"{source.stem}-{target}-{digest.hexdigest()[:16]}.cubin"
    if not out.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: an interrupt leaves nothing behind that looks like a result.
        part = out.with_suffix(f".{os.getpid()}")
        done = subprocess.run(nvcc_command(toolkit, target, source, part), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or done.stdout.strip() or "nvcc failed")
        for old in CUBINS.glob(f"{source.stem}-{target}-*.cubin"):
            old.unlink()
        part.rename(out)
    return out


# Files of csrc/cuda that are not named after an op.
_FILES = {"dots": "look", "project": "look"}
# What not every kernel of the other files has.
_OPTIONAL = {"gradient", "g_v"}

# What C++ calls the dtypes.
_CPP = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}


def demangle(names: Sequence[str]) -> list[str]:
    """By c++filt, which comes with the host's compiler; without it the names stay as they are."""
    if shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return done.stdout.split("\n")[: len(names)]


def name_and_dtype(demangled: str) -> tuple[str, str]:
    """``void a::(anonymous namespace)::b_kernel<c10::Half, true>(int)``: ("b<true>", "float16")."""
    plain = demangled.replace("(anonymous namespace)::", "")
    found = re.search(r"(\w+)(?:<([^()]*)>)?\(", plain)
    if found is None:
        return plain, "-"
    first, *rest = (found[2] or "").split(", ")
    dtype = _CPP.get(first, "-")
    parameters = rest if dtype != "-" else [first, *rest]
    suffix = f"<{', '.join(parameters)}>" if any(parameters) else ""
    return found[1].removesuffix("_kernel") + suffix, dtype


def cuda_job(toolkit: Any, job: tuple[str, Path]) -> Result:
    """The kernels of a file for a target; an exception is one line of the report."""
    target, source = job
    try:
        functions = inspect_cubin(compile_cubin(toolkit, target, source))
    except Exception as error:
        return [], [f"cuda {source.name} {target} was not compiled: {one_line(error)}"]
    if source.stem not in (*ARRAYS, *_FILES.values()):
        return [], [f"cuda {source.name} is not in the report: bench/kernels.py does not know its arrays"]
    rows = []
    for name, usage in zip(demangle(list(functions)), functions.values(), strict=True):
        kernel, dtype = name_and_dtype(name)
        op = kernel.partition("<")[0]
        if op in _FILES:
            loads, stores = map(set, ARRAYS[op])
        else:
            loads, stores = (set(names) - _OPTIONAL for names in ARRAYS[source.stem])
        rows.append(Row("cuda", kernel, dtype, target, usage, len(loads), len(stores)))
    rows.sort(key=lambda row: (row.kernel, DTYPES.index(row.dtype) if row.dtype in DTYPES else -1))
    return rows, [] if rows else [f"cuda {source.name} {target} has no kernels"]


def cuda_half(toolkit: Any, targets: Sequence[str], wanted: Callable[[str], bool]) -> Result:
    """Every file of csrc/cuda for every target."""
    sources = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if wanted(path.stem)]
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [(target, source) for source in sources for target in targets]
        return run_all(pool, partial(cuda_job, toolkit), jobs, "CUDA files")


# The report.


def run_all(pool: Executor, function: Callable[[Any], Result], jobs: Sequence[Any], what: str) -> Result:
    """The results of all jobs in their order; how far it is, on the standard error."""
    rows, problems = [], []
    for i, (more_rows, more_problems) in enumerate(pool.map(function, jobs), 1):
        rows += more_rows
        problems += more_problems
        if sys.stderr.isatty():
            print(f"\r{what}: {i} of {len(jobs)}", end="\n" if i == len(jobs) else "", file=sys.stderr, flush=True)
    return rows, problems


HEAD = ("", "kernel", "dtype", "target", "registers", "spills", "sspills", "stack", "shared", "load", "store", "")


def render(rows: Sequence[Row]) -> str:
    """The table; an exclamation mark behind a row that breaks a rule."""
    lines: list[tuple[str, ...]] = [HEAD]
    for row in rows:
        u = row.usage
        numbers = (u.registers, u.spills, u.scalar_spills, u.stack, u.shared, u.load, u.store)
        lines.append((row.language, row.kernel, row.dtype, row.target, *map(str, numbers), "!" * bool(row.broken())))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def names(text: str) -> list[str]:
    """Of a comma-separated list."""
    return [name for name in text.split(",") if name]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--kernels", default="", help="comma-separated ops, such as ascend,adam; default: all")
    parser.add_argument("--only", choices=["triton", "cuda"], help="default: both")
    parser.add_argument("--json", type=Path, help="also write the rows, and what is broken, there")
    args = parser.parse_args()
    targets, chosen = names(args.targets), names(args.kernels)
    if not targets:
        parser.error("--targets: no targets")
    if unknown := [target for target in targets if not re.fullmatch(r"sm_\d{2,3}|gfx\w+", target)]:
        parser.error(f"--targets: {', '.join(unknown)} is neither sm_NN nor gfxNNN")
    known = {case.op for case in CASES.values()}
    if unknown := sorted(set(chosen) - known):
        parser.error(f"--kernels: no {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if args.only != "cuda" and importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed; --only cuda does without")
    # Read when the kernels are imported, here and in the processes that compile them: they are not to be interpreted.
    for name in ("TRITON_INTERPRET", "SHARPKERN_BACKEND"):
        os.environ.pop(name, None)

    rows: list[Row] = []
    problems: list[str] = []
    notes: list[str] = []
    if args.only != "cuda":
        done = triton_half(targets, lambda op: not chosen or op in chosen)
        rows += done[0]
        problems += done[1]
    if args.only != "triton":
        toolkit = find_toolkit()
        nvidia = [target for target in targets if target.startswith("sm_")]
        if toolkit is None:
            notes.append("nvcc was not found: the CUDA files were left out.")
        else:
            listed = subprocess.run([toolkit.nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True)
            fit = [target for target in nvidia if target in listed.stdout.split()]
            if missing := [target for target in nvidia if target not in fit]:
                notes.append(f"nvcc {toolkit.version} does not compile for {', '.join(missing)}: left out.")
            # A file has an op and its variants.
            files = [f"{_FILES.get(op, op)}_" for op in chosen]
            done = cuda_half(
                toolkit, fit, lambda stem: not chosen or any(file.startswith(f"{stem}_") for file in files)
            )
            rows += done[0]
            problems += done[1]
    broken = problems + [line for row in rows for line in row.broken()]

    print(render(rows))
    print()
    for line in (*notes, *broken):
        print(line)
    verdict = f"{len(broken)} times a rule is broken" if broken else "nothing spilled, no stack, 16 bytes wide"
    print(f"{len(rows)} kernels: {verdict}." if rows or broken else "No kernels.")
    if args.json is not None:
        report = {"rows": [asdict(row) for row in rows], "notes": notes, "broken": broken}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
