"""``python -m bench.kernels``: what the compilers make of every kernel; nothing is run, and no GPU is needed.

Every Triton kernel, launched as the ops launch it, is compiled ahead of time for NVIDIA's sm_80, sm_90 and sm_100
and AMD's gfx942; every file of csrc/cuda by nvcc, with the flags of setup.py, for the same targets of NVIDIA's.
The exit status is 1 where one of these is broken:

- nothing is spilled, no thread has a stack. (On AMD ``sspills``, scalar registers that wait in lanes of a vector
  register, are only shown: they cost instructions, but no memory, or there would be a stack.)
- the widest loads and stores of global memory move 16 bytes: those of whole, aligned blocks. There must be one for
  each array that a block loads or stores, since a few scalars side by side may make a wide access too. In Triton
  half-precision arrays beside float32 state may be narrower than that state (see ``walk.options``).
  ``16 x8``: the widest is 16 bytes, eight instructions.
- every op and every kernel of sharpkern.ops.triton, and every kernel of csrc/cuda, is in the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
JOBS = min(2, os.cpu_count() or 1)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "float64", "bfloat16", "float16")
WIDE = 16  # bytes

# The arrays that a block loads, and those that it stores, by their names in the schemas.
ARRAYS: dict[str, tuple[set[str], set[str]]] = {
    "norm": ({"grads"}, set()),
    "norm_scaled": ({"params", "grads"}, set()),
    "dots": ({"gradient", "grads"}, set()),
    "project": ({"gradient", "grads"}, {"g_v"}),
    "ascend": ({"params", "grads"}, {"params", "backup", "gradient"}),
    "ascend_scaled": ({"params", "grads"}, {"params", "backup"}),
    "restore": ({"backup"}, {"params"}),
    "mix": (set(), set()),
    "sgd": ({"params", "grads", "direction", "momentum_buffer"}, {"params", "momentum_buffer"}),
    "adam": (
        {"params", "grads", "direction", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        {"params", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    ),
}
# Those in the dtype of the parameters; the others are state.
OF_PARAMETERS = {"params", "grads", "backup", "gradient"}


class Case(NamedTuple):
    """How an op is called: which tensors are empty, of which dtype the direction is, and the rest as in a step of
    SAM, or otherwise."""

    op: str
    without: tuple[str, ...] = ()
    narrow: bool = False  # the direction has the dtype of the parameters, not that of the state
    in_sam: bool = True

    def accesses(self, *, beside_state: bool = False) -> tuple[int, int]:
        """How many wide loads, and stores, its kernel has at least: of state alone, where there is some and the
        parameters are narrower."""
        loads, stores = (names - set(self.without) for names in ARRAYS[self.op])
        state = (loads | stores) - OF_PARAMETERS - ({"direction"} if self.narrow else set())
        return (len(loads & state), len(stores & state)) if beside_state and state else (len(loads), len(stores))


_NO_V, _IN_PLACE = ("direction", "coefficients"), ("backup", "counters")
CASES = {
    "norm": Case("norm", ("ema",)),
    "norm, statistics": Case("norm"),
    "norm, statistics, two buffers": Case("norm", in_sam=False),
    "norm_scaled": Case("norm_scaled", ("ema",)),
    "norm_scaled, statistics": Case("norm_scaled"),
    "dots": Case("dots"),
    "project": Case("project"),
    "ascend": Case("ascend", ("gradient",)),
    "ascend, gradient kept": Case("ascend"),
    "ascend, in place": Case("ascend", ("backup", "gradient")),
    "ascend, in place, gradient kept": Case("ascend", ("backup",)),
    "ascend, unchecked": Case("ascend", ("gradient", "counters"), in_sam=False),
    "ascend_scaled": Case("ascend_scaled"),
    "restore": Case("restore"),
    "mix": Case("mix"),
    "mix, two buffers": Case("mix", in_sam=False),
}
for _op, _plain, _full in (("sgd", ", no momentum", ""), ("adam", "", ", amsgrad")):
    _least: tuple[str, ...] = ("max_exp_avg_sq",) if _op == "adam" else ()
    _none = _least or ("momentum_buffer",)
    CASES[f"{_op}, a g"] = Case(_op, (*_least, "direction"))
    for _v, _without, _narrow in (("", _NO_V, False), (", along v", (), False), (", along a narrow v", (), True)):
        CASES[f"{_op}{_v}{_plain}"] = Case(_op, (*_without, *_none), _narrow)
        CASES[f"{_op}{_v}{_full}"] = Case(_op, _without, _narrow)
        # In place nothing is copied from a backup: no wide copy can hide a narrow update.
        CASES[f"{_op}{_v}, in place"] = Case(_op, (*_without, *_least, *_IN_PLACE), _narrow, in_sam=False)

# The kernels of csrc/cuda by their template arguments after the dtype; without them where these do not matter.
CUDA = {
    "norm<false>": Case("norm"),
    "norm<true>": Case("norm_scaled"),
    "dots": Case("dots"),
    "project": Case("project"),
    "ascend<false, true, false>": Case("ascend", ("gradient",)),
    "ascend<false, true, true>": Case("ascend"),
    "ascend<false, false, false>": Case("ascend", ("backup", "gradient")),
    "ascend<false, false, true>": Case("ascend", ("backup",)),
    "ascend<true, true, false>": Case("ascend_scaled"),
    "restore": Case("restore"),
    "mix": Case("mix"),
    **{f"{op}<void>": Case(op, ("direction", "max_exp_avg_sq")) for op in ("sgd", "adam")},
    "sgd": Case("sgd"),
    "adam": Case("adam", ("max_exp_avg_sq",)),
}


# What a compiler made, and what is asked of it.


class Access(NamedTuple):
    """The widest of some instructions: bytes, and how many are so wide."""

    bytes: int = 0
    count: int = 0

    def __str__(self) -> str:
        return f"{self.bytes} x{self.count}" if self.count else "-"


def widest(bits: Sequence[str]) -> Access:
    """Of instructions with so many bits each; "": 32 or fewer."""
    widths = [int(number or 32) // 8 for number in bits]
    return Access(max(widths), widths.count(max(widths))) if widths else Access()


class Usage(NamedTuple):
    """What one kernel takes of a target; the report's columns."""

    registers: int
    spills: int  # NVIDIA: instructions that access local memory; AMD: vector registers
    sspills: int  # AMD: scalar registers
    stack: int  # bytes a thread; AMD's scratch
    shared: int  # bytes, static and dynamic; from sm_90 on with the KiB that the driver takes of those who use any
    load: Access
    store: Access


class Row(NamedTuple):
    """A line of the report."""

    language: str
    kernel: str
    dtype: str
    target: str
    usage: Usage
    loads: int  # how many wide ones it has at least
    stores: int

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
        return [f"{' '.join(self[:4])} {rule}" for rule in rules]


# Rows, and what went wrong.
Result = tuple[list[Row], list[str]]


_RESOURCES = re.compile(r"Function (.+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# After the address and perhaps a predicate. LD and ST are those whose address only the running kernel knows to be
# global memory's; LDS and STS, shared memory's, are none of these.
_SASS = re.compile(r"\*/\s+(?:@!?\w+ )?(LDG|LD|STG|ST|LDL|STL)(?:\.(?:(64|128|256)\b|\w+))* ")


def read_cubins(dump: str) -> list[tuple[str, str, Usage]]:
    """(target, function, usage) of everything in the output of ``cuobjdump -res-usage -sass``."""
    functions = []
    for section in dump.split("Resource usage:")[1:]:
        target = re.findall(r"code for (\w+)", section)[0]
        code = dict(re.findall(r"Function : (.+)\n([^\0]*?)(?=\n\s*Function :|\Z)", section))
        for name, *numbers in _RESOURCES.findall(section):
            registers, stack, shared, local = map(int, numbers)
            found = _SASS.findall(code[name])
            load, store = (widest([bits for it, bits in found if it in (kind, f"{kind}G")]) for kind in ("LD", "ST"))
            spills = sum(instruction.endswith("L") for instruction, _ in found)
            functions.append((target, name, Usage(registers, spills, 0, max(stack, local), shared, load, store)))
    return functions


def dump_cubins(path: Path | str) -> str:
    """What ``read_cubins`` reads, of a cubin or an object file."""
    # Triton brings one; so do most CUDA toolkits.
    triton = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or []]
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if cuobjdump is None:
        raise RuntimeError("there is no cuobjdump to read it with: install triton, or put CUDA's on the PATH")
    return subprocess.run([cuobjdump, "-res-usage", "-sass", path], check=True, capture_output=True, text=True).stdout


_AMD = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(?:dwordx(\d)|[a-z]+(\d+)\b)?", re.MULTILINE)
_AMD_NUMBERS = (
    "vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size"
)  # fmt: skip


def read_amdgcn(text: str) -> Usage:
    """Of the one kernel in an assembly file."""
    numbers = []
    for name in _AMD_NUMBERS:
        found = re.search(rf"^ *-? *\.{name}: +(\d+)$", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the assembly does not tell its {name}")
        numbers.append(int(found[1]))
    bits: dict[str, list[str]] = {"load": [], "store": []}
    for kind, words, number in _AMD.findall(text):
        bits[kind].append(f"{32 * int(words)}" if words else number)
    return Usage(*numbers, widest(bits["load"]), widest(bits["store"]))


# The Triton half. What imports torch and Triton does so late: main first sees to the environment.


def arguments(case: Case, dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an op like those that the optimizers have for it on a device."""
    import torch

    from sharpkern.ops import schema

    rows, state, doubles = 3, schema.state_dtype(dtype), partial(torch.zeros, dtype=torch.float64)
    squares = doubles((1 if case.op.startswith("ascend") else 2, 1) if case.in_sam else (1, 2))
    written = {"norm": squares[-1], "norm_scaled": squares[-1], "dots": doubles(2), "project": squares[0, 0]}
    table = torch.zeros(schema.COLUMNS, rows, dtype=torch.int64).t()  # as on a device: column after column
    known = {
        "table": table if case.in_sam else table.contiguous(),
        "blocks": torch.zeros(rows, 2, dtype=torch.int32),
        **{name: torch.zeros(schema.BLOCK, dtype=dtype) for name in ("backup", "gradient")},
        "direction": torch.zeros(schema.BLOCK, dtype=dtype if case.narrow else state),
        "step": torch.zeros(rows),
        "counters": torch.zeros(3, dtype=torch.int64),
        "partials": doubles(schema.partials_size(schema.BLOCK, rows)),
        "radius": doubles(1, 2),
        "values": doubles(1, len(getattr(schema, case.op.upper(), ()))),
        "coefficients": doubles(2),
        "products": doubles(3, 1),
        "ema": doubles(len(schema.EMA)),
        "sq": written.get(case.op, squares),
        "numerator": squares[0],
        "denominator": squares[-1],
        "dtype": dtype,
    }
    by_type = {"List[Tensor]": [], "float": 0.5, "List[float]": [1.0, 0.5], "int": 0, "bool": case.in_sam}
    positional, named = [], {}
    for argument in getattr(torch.ops.sharpkern, case.op).default._schema.arguments:
        value = known.get(argument.name, by_type.get(str(argument.type)))
        if value is None:
            value = torch.zeros(schema.BLOCK, dtype=state)
        if argument.name in case.without:
            value = value[:0]
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    return positional, named


def launch_of(case: Case, dtype: str, backend: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel that a case launches and with what, options for one of Triton's backends among it."""
    import torch
    from triton.runtime.jit import JITFunction

    from sharpkern.ops import triton
    from sharpkern.ops.triton import walk

    launched = []

    def options(device_type: str, *args: Any) -> dict[str, Any]:
        return walk.options(backend, *args)

    def run(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append((kernel, args, kwargs))

    positional, named = arguments(case, getattr(torch, dtype))
    with mock.patch.object(walk, "_options", options), mock.patch.object(JITFunction, "run", run):
        triton.IMPLEMENTATIONS[case.op](*positional, **named)
    (launch,) = launched  # an op is one launch
    return launch


def uncovered() -> list[str]:
    """Ops and kernels of sharpkern.ops.triton that no case launches."""
    from triton.runtime.jit import JITFunction

    from sharpkern.ops import triton

    ops = {case.op for case in CASES.values()}
    launched = {launch_of(case, "float32", "cuda")[0].__name__ for case in CASES.values()}
    there = set(triton.IMPLEMENTATIONS)
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel"):
                if not isinstance(value, JITFunction):
                    raise RuntimeError(f"{name} is not compiled in this process: TRITON_INTERPRET was set too early")
                there.add(name)
    return [f"triton {name} is not in the report: no case launches it" for name in sorted(there - ops - launched)]


def compile_case(name: str, dtype: str, target: str) -> Row:
    """Compile the kernel that a case launches, through the same specialization as a launch on a device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
    # In place of the driver of a GPU: Triton asks it only what to compile for, and keeps what it has by device.
    device = {"get_current_device": lambda: str(gpu), "get_current_stream": lambda device: 0}
    driver.set_active(SimpleNamespace(get_current_target=lambda: gpu, **device))
    kernel, args, kwargs = launch_of(CASES[name], dtype, gpu.backend)
    compiled = kernel.run(*args, warmup=True, **kwargs)
    if "amdgcn" in compiled.asm:
        usage = read_amdgcn(compiled.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            ((_, _, usage),) = read_cubins(dump_cubins(path))
    usage = usage._replace(shared=usage.shared + compiled.metadata.shared)
    return Row("triton", name, dtype, target, usage, *CASES[name].accesses(beside_state=dtype.endswith("float16")))


def triton_job(job: tuple[str, str, str]) -> Result:
    """``compile_case``; an exception is one line of the report."""
    try:
        return [compile_case(*job)], []
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason was given"]
        telling = [line for line in lines if re.search(r"\b(fatal|error) *:", line)] or lines[-1:]
        return [], [f"triton {' '.join(job)} was not compiled: {type(error).__name__}: {telling[0].strip()}"]


def triton_half(targets: Sequence[str], ops: Sequence[str]) -> Result:
    """Every case, for every dtype and target."""
    jobs = [
        (name, dtype, target)
        for name, case in CASES.items()
        if case.op in ops
        for target in targets
        for dtype in (DTYPES[:1] if case.op == "mix" else DTYPES[2:] if case.narrow else DTYPES)
    ]
    problems = uncovered()
    rows = []
    # Triton has one driver in a process.
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for i, (row, problem) in enumerate(pool.map(triton_job, jobs), 1):
            rows += row
            problems += problem
            if sys.stderr.isatty():
                print(f"\rTriton kernels: {i} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    return rows, problems


# The CUDA half.


def load_setup() -> Any:
    """setup.py as a module: it finds nvcc, and compiles csrc/cuda as in the package's build."""
    spec = importlib.util.spec_from_file_location("sharpkern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, SHARPKERN_EXT="0"):
        spec.loader.exec_module(module)
    return module


# What C++ calls the dtypes.
_CPP = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}


def name_and_dtype(function: str) -> tuple[str, str]:
    """``void a::(anonymous namespace)::b_kernel<c10::Half, true>(int)``: ("b<true>", "float16")."""
    found = re.search(r"(\w+)_kernel(?:<([^()]*)>)?\(", function)
    if found is None:
        return function, "-"
    first, *rest = (found[2] or "-").split(", ")
    return found[1] + (f"<{', '.join(rest)}>" if rest else ""), _CPP.get(first, first)


def read_object(path: Path | str, ops: Sequence[str]) -> Result:
    """Every kernel of some ops in an object file."""
    dump = subprocess.run(["c++filt"], input=dump_cubins(path), check=True, capture_output=True, text=True).stdout
    functions = read_cubins(dump)
    rows, problems = [], [] if functions else [f"cuda {Path(path).name} has no kernels"]
    for target, function, usage in functions:
        kernel, dtype = name_and_dtype(function)
        case = CUDA.get(kernel, CUDA.get(kernel.partition("<")[0]))
        if case is None:
            problems.append(f"cuda {kernel} {dtype} {target} is not in the report: its arrays are not known")
        elif case.op in ops:
            rows.append(Row("cuda", kernel, dtype, target, usage, *case.accesses()))
    return sorted(rows), problems


def cuda_half(targets: Sequence[str], ops: Sequence[str]) -> tuple[list[Row], list[str], list[str]]:
    """Every file of csrc/cuda: rows, what went wrong, and what was left out."""
    from torch.utils.cpp_extension import include_paths

    setup = load_setup()
    # Nothing is linked, so torch may be of another CUDA.
    any_torch = SimpleNamespace(version=SimpleNamespace(cuda=None, hip=None))
    architectures = " ".join(re.sub(r"sm_(\d+)(\d)", r"\1.\2", target) for target in targets)
    environment = {"SHARPKERN_CUDA": "", "TORCH_CUDA_ARCH_LIST": architectures, "MAX_JOBS": str(JOBS)}
    with mock.patch.dict(os.environ, environment), redirect_stdout(sys.stderr):
        toolkit = setup.find_toolkit(any_torch)
        if toolkit is None:
            return [], [], ["nvcc was not found: the CUDA files were left out."]
        try:
            objects = setup.compile_cuda(toolkit, Path("build/kernels"), include_paths())
        except SystemExit as error:  # nvcc has said why
            return [], [str(error)], []
    results = [read_object(path, ops) for path in objects]
    rows = [row for more, _ in results for row in more]
    missing = sorted(set(targets) - {row.target for row in rows})
    notes = [f"nvcc {toolkit.version} does not compile for {', '.join(missing)}: left out."] if missing else []
    return [row for row in rows if row.target in targets], [line for _, more in results for line in more], notes


# The report.

HEAD = ("", "kernel", "dtype", "target", *Usage._fields, "")


def render(rows: Sequence[Row]) -> str:
    """The table; an exclamation mark behind a row that breaks a rule."""
    lines = [HEAD, *((*row[:4], *map(str, row.usage), "!" * bool(row.broken())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def target(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}|gfx\w+", text):
        raise argparse.ArgumentTypeError(f"{text} is neither sm_NN nor gfxNNN")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", type=target, default=TARGETS, help="default: %(default)s")
    parser.add_argument("--kernels", nargs="+", choices=ARRAYS, default=list(ARRAYS), help="ops; default: all")
    parser.add_argument("--only", choices=["triton", "cuda"], help="default: both")
    args = parser.parse_args()
    if args.only != "cuda" and importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed; --only cuda does without")
    # Read when the kernels are imported, here and in the processes that compile them: they are not to be interpreted.
    for name in ("TRITON_INTERPRET", "SHARPKERN_BACKEND"):
        os.environ.pop(name, None)

    rows: list[Row] = []
    broken: list[str] = []
    notes: list[str] = []
    if args.only != "cuda":
        rows, broken = triton_half(args.targets, args.kernels)
    nvidia = [name for name in args.targets if name.startswith("sm_")]
    if args.only != "triton" and nvidia:
        more_rows, more_broken, notes = cuda_half(nvidia, args.kernels)
        rows += more_rows
        broken += more_broken
    broken += [line for row in rows for line in row.broken()]
    verdict = f"{len(broken)} times a rule is broken" if broken else "nothing spilled, no stack, 16 bytes wide"
    print(render(rows), "", *notes, *broken, f"{len(rows)} kernels: {verdict}.", sep="\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
