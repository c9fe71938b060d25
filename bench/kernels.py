"""``python -m bench.kernels``: what the compilers make of every kernel; nothing is run, and no GPU is needed.

Every Triton kernel, launched as the ops launch it, is compiled ahead of time for NVIDIA's sm_80, sm_90 and sm_100
and AMD's gfx942; every file of csrc/cuda by nvcc, with the flags of setup.py, for the same targets of NVIDIA's.
The exit status is 1 where one of these is broken:

- nothing is spilled, no thread has a stack. (On AMD ``sspills``, scalar registers that wait in lanes of a vector
  register, are only shown: they cost instructions, but no memory, or there would be a stack.)
- the widest loads and stores of global memory move 16 bytes: those of whole, aligned blocks. There must be one for
  each array that a block loads or stores, since a few scalars side by side may make a wide access too.
  Half-precision arrays beside float32 state may be narrower than that state (see ``walk.options`` for Triton, and
  ``elements`` in walk.cuh).
  ``16 x8``: the widest is 16 bytes, eight instructions.
- from sm_90 on every kernel of csrc/cuda waits for the one ahead of it before it accesses global memory, or
  branches (``wait_for_previous`` in walk.cuh).
- every op and every kernel of sharpkern.ops.triton, and every kernel of csrc/cuda, is in the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from rich.console import Console
from rich.progress import track

JOBS = min(2, os.cpu_count() or 1)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("float32", "float64", "bfloat16", "float16")
WIDE = 16  # bytes

# The arrays that a block loads, and those that it stores, by their names in the schemas.
ARRAYS: dict[str, tuple[set[str], set[str]]] = {
    "norm": ({"grads"}, set()),
    "norm_scaled": ({"params", "grads"}, set()),
    "norm_max": ({"grads"}, set()),
    "norm_p": ({"grads"}, set()),
    "ascend_p": ({"params", "grads"}, {"params", "backup"}),
    "dots": ({"gradient", "grads"}, set()),
    "project": ({"gradient", "grads"}, {"g_v"}),
    "combine": ({"grads", "x", "v"}, {"out"}),
    "ascend": ({"params", "grads"}, {"params", "backup", "gradient"}),
    "ascend_scaled": ({"params", "grads"}, {"params", "backup"}),
    "restore": ({"backup"}, {"params"}),
    "mix": (set(), set()),
    "sgd": ({"params", "grads", "direction", "momentum_buffer"}, {"params", "momentum_buffer"}),
    "adam": (
        {"params", "grads", "direction", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        {"params", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    ),
    "nudge_dots": ({"params", "grads", "momentum_buffer", "eigenvectors"}, set()),
    "nudge_sgd": ({"params", "grads", "momentum_buffer", "eigenvectors"}, {"params", "momentum_buffer"}),
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
    exponent: float = 0.5  # of ascend_p
    master: bool = False  # half types with float32 masters

    def accesses(self, *, beside_state: bool = False) -> tuple[int, int]:
        """How many wide loads, and stores, its kernel has at least: of state alone, where there is some and the
        parameters are narrower."""
        loads, stores = (names - set(self.without) for names in ARRAYS[self.op])
        if self.master:
            # The weights come from there. An ascent has them kept there; a step writes both.
            steps = "params" in stores and not {"backup"} & (loads | stores)
            loads, stores = (
                loads - {"params", "backup"} | {"master"},
                stores - {"backup"} | ({"master"} if steps else set()),
            )
        state = (loads | stores) - OF_PARAMETERS - ({"direction"} if self.narrow else set())
        return (len(loads & state), len(stores & state)) if beside_state and state else (len(loads), len(stores))


CASES = {
    "norm": Case("norm", ("ema",)),
    "norm, statistics": Case("norm"),
    "norm, statistics, two buffers": Case("norm", in_sam=False),
    "norm_scaled": Case("norm_scaled", ("ema",)),
    "norm_scaled, statistics": Case("norm_scaled"),
    "norm_max": Case("norm_max", ("ema",)),
    "norm_max, statistics": Case("norm_max"),
    "norm_p": Case("norm_p"),
    "ascend_p": Case("ascend_p"),
    "ascend_p, the sign": Case("ascend_p", exponent=0.0),
    "dots": Case("dots"),
    "project": Case("project"),
    "combine": Case("combine", ("x",)),
    "combine, flat": Case("combine", ("grads",)),
    "ascend": Case("ascend", ("gradient",)),
    "ascend, gradient kept": Case("ascend"),
    "ascend, in place": Case("ascend", ("backup", "gradient")),
    "ascend, in place, gradient kept": Case("ascend", ("backup",)),
    "ascend, unchecked": Case("ascend", ("gradient", "counters"), in_sam=False),
    "ascend_scaled": Case("ascend_scaled"),
    "restore": Case("restore"),
    "mix": Case("mix"),
    "mix, two buffers": Case("mix", in_sam=False),
    "nudge_dots": Case("nudge_dots"),
    "nudge_dots, no momentum_buffer": Case("nudge_dots", ("momentum_buffer",)),
    "nudge_sgd": Case("nudge_sgd"),
    "nudge_sgd, no momentum_buffer": Case("nudge_sgd", ("momentum_buffer",)),
    "nudge_sgd, two buffers": Case("nudge_sgd", in_sam=False),
}
# Of the rules: with which direction v, without which state, where. In place nothing is copied from a backup: no wide
# copy can hide a narrow update.
for _op, _optional in (("sgd", "momentum_buffer"), ("adam", "max_exp_avg_sq")):
    CASES[f"{_op}, a g"] = Case(_op, ("direction",))
    for (_v, _no_v, _narrow), (_state, _no_state), (_place, _no_backup) in itertools.product(
        (("", ("direction", "coefficients"), False), (", along v", (), False), (", along a narrow v", (), True)),
        (("", ()), (f", no {_optional}", (_optional,))),
        (("", ()), (", in place", ("backup", "counters"))),
    ):
        _without = (*_no_v, *_no_state, *_no_backup)
        CASES[_op + _v + _state + _place] = Case(_op, _without, _narrow, in_sam=not _place)

MASTERED = ("norm_scaled", "ascend_p", "ascend", "ascend_scaled", "restore", "sgd", "adam", "nudge_dots", "nudge_sgd")
CASES |= {f"{name}, master": case._replace(master=True) for name, case in CASES.items()
          if case.op in MASTERED and "backup" not in case.without and case.in_sam}  # fmt: skip

# Kernels whose last template argument is the dtype of the weights: another one than the first is a master's.
OF_WEIGHTS = ("norm", "ascend_p", "ascend", "restore", "sgd", "adam", "nudge_dots", "nudge_sgd")
# The kernels of csrc/cuda by their template arguments between the dtypes; without them where these do not matter.
CUDA = {
    "norm<false>": Case("norm"),
    "norm<true>": Case("norm_scaled"),
    "norm_max": Case("norm_max"),
    "norm_p": Case("norm_p"),
    "ascend_p<false>": Case("ascend_p"),
    "ascend_p<true>": Case("ascend_p", exponent=0.0),
    "dots": Case("dots"),
    "project": Case("project"),
    "combine": Case("combine", ("x",)),
    "ascend<false, true, false>": Case("ascend", ("gradient",)),
    "ascend<false, true, true>": Case("ascend"),
    "ascend<false, false, false>": Case("ascend", ("backup", "gradient")),
    "ascend<false, false, true>": Case("ascend", ("backup",)),
    "ascend<true, true, false>": Case("ascend_scaled"),
    "restore": Case("restore"),
    "mix": Case("mix"),
    "sgd<void>": Case("sgd", ("direction",)),
    "sgd": Case("sgd"),
    "adam<void>": Case("adam", ("direction",)),
    "adam": Case("adam"),
    "nudge_dots": Case("nudge_dots"),
    "nudge_sgd": Case("nudge_sgd"),
}


# What a compiler made, and what is asked of it.


class Access(NamedTuple):
    """The widest of some instructions: bytes, and how many are so wide."""

    bytes: int = 0
    times: int = 0

    def __str__(self) -> str:
        return f"{self.bytes} x{self.times}" if self.times else "-"


def widest(widths: Sequence[int]) -> Access:
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
    waits: bool = True  # for the kernel ahead of it, where it is launched so that it has to

    def broken(self) -> list[str]:
        """The rules that it breaks."""
        usage, rules = self.usage, []
        if usage.spills:
            rules.append(f"spills {usage.spills}")
        if usage.stack:
            rules.append(f"has a stack of {usage.stack} bytes")
        if not self.waits:
            rules.append("accesses memory, or branches, before it waits for the kernel ahead")
        for what, access, least in (("load", usage.load, self.loads), ("store", usage.store, self.stores)):
            if least and access.bytes < WIDE:
                rules.append(f"{what}s {access.bytes} bytes at most")
            elif access.times < least:
                rules.append(f"has {access.times} {what}s of {access.bytes} bytes for {least} arrays")
        return [f"{' '.join(self[:4])} {rule}" for rule in rules]


# What goes into the report: a row, or what went wrong.
Line = Row | str


_RESOURCES = re.compile(r"Function (.+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# After the address and perhaps a predicate. LD and ST are those whose address only the running kernel knows to be
# global memory's; LDS and STS, shared memory's, are none of these. What has no number moves 4 bytes at most.
_SASS = re.compile(r"\*/\s+(?:@!?\w+ )?(LD|ST)(G|L|)(?:\.(?:(64|128|256)\b|\w+))* ")
# ACQBULK is PTX's griddepcontrol.wait.
_FIRST = re.compile(r"\*/\s+(@!?\w+ )?(ACQBULK|(?:LD|ST|ATOM|RED)G?|BR[AX]|JMP|CALL|EXIT)\b")


def read_cubins(dump: str) -> Iterator[tuple[str, str, Usage, bool]]:
    """(target, function, usage, whether it waits for the kernel ahead before all else) of everything in the output of
    ``cuobjdump -res-usage -sass``."""
    for section in dump.split("Resource usage:")[1:]:
        target = re.findall(r"code for (\w+)", section)[0]
        code = dict(re.findall(r"Function : (.+)\n([^\0]*?)(?=\n\s*Function :|\Z)", section))
        for name, *numbers in _RESOURCES.findall(section):
            registers, stack, shared, local = map(int, numbers)
            found = _SASS.findall(code[name])
            load, store = (
                widest([int(bits or 32) // 8 for kind, space, bits in found if kind == wanted and space != "L"])
                for wanted in ("LD", "ST")
            )
            spills = sum(space == "L" for _, space, _ in found)
            first = _FIRST.search(code[name])
            waits = first is not None and first.groups() == (None, "ACQBULK")
            yield target, name, Usage(registers, spills, 0, max(stack, local), shared, load, store), waits


def dump_cubins(path: Path | str, *options: str) -> str:
    """What ``read_cubins`` reads, of a cubin, an object file or a library; with further options of cuobjdump."""
    # Triton brings one; so do most CUDA toolkits.
    triton = importlib.util.find_spec("triton")
    folders = [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or []]
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if cuobjdump is None:
        raise RuntimeError("there is no cuobjdump to read it with: install triton, or put CUDA's on the PATH")
    command = [cuobjdump, "-res-usage", "-sass", *options, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_AMD = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(?:dwordx(\d)|[a-z]+(\d+)\b)?", re.MULTILINE)


def read_amdgcn(text: str) -> Usage:
    """Of the one kernel in an assembly file."""
    metadata = dict(re.findall(r"^ *-? *\.(\w+): +(\d+)$", text, re.MULTILINE))
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size",
             "group_segment_fixed_size")  # fmt: skip
    registers, spills, sspills, stack, shared = (int(metadata[name]) for name in names)
    found = _AMD.findall(text)
    load, store = (
        widest([4 * int(words) if words else int(bits or 32) // 8 for kind, words, bits in found if kind == wanted])
        for wanted in ("load", "store")
    )
    return Usage(registers, spills, sspills, stack, shared, load, store)


# The Triton half. What imports torch and Triton does so late: main first sees to the environment.


def arguments(case: Case, dtype: Any) -> dict[str, Any]:
    """Arguments of an op, in the order of its schema, like those that the optimizers have for it on a device."""
    import torch

    from sharpkern.ops import schema

    rows, directions, state, doubles = 3, 5, schema.state_dtype(dtype), partial(torch.zeros, dtype=torch.float64)
    squares = doubles((1 if case.op.startswith("ascend") else 2, 1) if case.in_sam else (1, 2))
    written = dict.fromkeys(("norm", "norm_scaled", "norm_max"), squares[-1])
    written |= dict.fromkeys(("norm_p", "project", "combine", "nudge_dots"), squares[0, 0]) | {"dots": doubles(2)}
    table = torch.zeros(schema.COLUMNS, rows, dtype=torch.int64).t()  # as on a device: column after column
    known = {
        "table": table if case.in_sam else table.contiguous(),
        "blocks": torch.zeros(rows, 2, dtype=torch.int32),
        "gradient": torch.zeros(schema.BLOCK, dtype=dtype),
        "backup": torch.zeros(schema.BLOCK, dtype=state if case.master else dtype),
        "master": torch.zeros(schema.BLOCK if case.master else 0, dtype=state),
        "direction": torch.zeros(schema.BLOCK, dtype=dtype if case.narrow else state),
        "step": torch.zeros(rows),
        "counters": torch.zeros(3, dtype=torch.int64),
        "partials": doubles(schema.partials_size(schema.BLOCK, rows, directions)),
        "values": doubles(1, len(getattr(schema, case.op.upper(), schema.NUDGED))),
        "eigenvectors": torch.zeros(directions, schema.BLOCK, dtype=state),
        "along": doubles(2 * directions, *([] if case.op == "nudge_dots" else [squares.size(1)])),
        **{name: doubles(*n) for name, n in {"radius": (1, 2), "products": (3, 1), "coefficients": (2,)}.items()},
        "ema": doubles(len(schema.EMA)),
        "sq": written.get(case.op, squares),
        **dict.fromkeys(("numerator", "largest", "powers"), squares[0]),
        "exponent": case.exponent,
        "checks": squares,
        "denominator": squares[-1],
        "dtype": dtype,
    }
    by_type = {"List[Tensor]": [], "float": 0.5, "List[float]": [1.0, 0.5], "int": 0, "bool": case.in_sam}
    values = {}
    for argument in getattr(torch.ops.sharpkern, case.op).default._schema.arguments:
        value = known.get(argument.name, by_type.get(str(argument.type)))
        if value is None:
            value = torch.zeros(schema.BLOCK, dtype=state)
        values[argument.name] = value[:0] if argument.name in case.without else value
    return values


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

    values = arguments(case, getattr(torch, dtype))
    named = {
        argument.name: values.pop(argument.name)
        for argument in getattr(torch.ops.sharpkern, case.op).default._schema.arguments
        if argument.kwarg_only
    }
    with mock.patch.object(walk, "_options", options), mock.patch.object(JITFunction, "run", run):
        triton.IMPLEMENTATIONS[case.op](*values.values(), **named)
    (launch,) = launched  # an op is one launch
    return launch


def uncovered() -> list[str]:
    """Ops and kernels of sharpkern.ops.triton that no case launches."""
    from sharpkern.ops import triton

    covered = {case.op for case in CASES.values()}
    covered |= {launch_of(case, DTYPES[-1], "cuda")[0].__name__ for case in CASES.values()}
    there = set(triton.IMPLEMENTATIONS)
    for module in pkgutil.iter_modules(triton.__path__, f"{triton.__name__}."):
        there |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    return [f"triton {name} is not in the report: no case launches it" for name in sorted(there - covered)]


def compile_case(name: str, dtype: str, target: str) -> Row:
    """Compile the kernel that a case launches, through the same specialization as a launch on a device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    # In place of the driver of a GPU: Triton asks it only what to compile for, and keeps what it has by device.
    device = {"get_current_device": lambda: str(gpu), "get_current_stream": lambda device: 0}
    driver.set_active(SimpleNamespace(get_current_target=lambda: gpu, **device))
    kernel, args, kwargs = launch_of(CASES[name], dtype, gpu.backend)
    compiled = kernel.run(*args, warmup=True, **kwargs)
    if "amdgcn" in compiled.asm:
        usage = read_amdgcn(compiled.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            ((_, _, usage, _),) = read_cubins(dump_cubins(file.name))
    usage = usage._replace(shared=usage.shared + compiled.metadata.shared)
    return Row("triton", name, dtype, target, usage, *CASES[name].accesses(beside_state=dtype.endswith("float16")))


def triton_job(job: tuple[str, str, str]) -> Line:
    """``compile_case``; an exception is one line of the report."""
    try:
        return compile_case(*job)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason was given"]
        telling = [line for word in ("fatal", "error") for line in lines if re.search(rf"\b{word} *:", line)]
        reason = (telling or lines[-1:])[0].strip()
        return f"triton {' '.join(job)} was not compiled: {type(error).__name__}: {reason}"


def triton_half(targets: Sequence[str], ops: Sequence[str]) -> Iterator[Line]:
    """Every case, for every dtype and target."""
    yield from uncovered()
    jobs = [
        (name, dtype, target)
        for name, case in CASES.items()
        if case.op in ops
        for target in targets
        for dtype in (DTYPES[:1] if case.op == "mix" else DTYPES[2:] if case.narrow or case.master else DTYPES)
    ]
    # Triton has one driver in a process.
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        lines = pool.map(triton_job, jobs)
        yield from track(lines, "Triton", len(jobs), console=Console(stderr=True))


# The CUDA half.


# What C++ calls the dtypes.
_CPP = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}


def read_object(path: Path | str, ops: Sequence[str], *options: str) -> Iterator[Line]:
    """Every kernel of some ops in an object file or a library."""
    dump = dump_cubins(path, *options)
    dump = subprocess.run(["c++filt"], input=dump, check=True, capture_output=True, text=True).stdout
    functions = list(read_cubins(dump))
    if not functions:
        yield f"cuda {path} has no kernels"
    for target, function, usage, waits in functions:
        # void a::(anonymous namespace)::b_kernel<c10::Half, true>(int)  is b<true> for float16.
        found = re.search(r"(\w+)_kernel(?:<([^()]*)>)?\(", function)
        name, template = found.groups() if found else (function, None)
        first, *rest = (template or "-").split(", ")
        master = name in OF_WEIGHTS and rest[-1:] != [] and rest.pop() != first
        kernel, dtype = name + (f"<{', '.join(rest)}>" if rest else ""), _CPP.get(first, first)
        case = CUDA.get(kernel, CUDA.get(name))
        if master and case is not None:
            kernel, case = f"{kernel}, master", case._replace(master=True)
        if case is None:
            yield f"cuda {kernel} {dtype} {target} is not in the report: its arrays are not known"
        elif case.op in ops:
            must_wait = int(target.removeprefix("sm_")) >= 90
            least = case.accesses(beside_state=dtype.endswith("float16"))
            yield Row("cuda", kernel, dtype, target, usage, *least, waits or not must_wait)


def cuda_half(targets: Sequence[str], ops: Sequence[str]) -> Iterator[Line]:
    """Every file of csrc/cuda."""
    from torch.utils.cpp_extension import include_paths

    # setup.py finds nvcc, and compiles as in the package's build.
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, SHARPKERN_EXT="0"):
        setup = importlib.import_module("setup")
    # Nothing is linked, so torch may be of another CUDA.
    any_torch = SimpleNamespace(version=SimpleNamespace(cuda=None, hip=None))
    architectures = " ".join(re.sub(r"sm_(\d+)(\d)", r"\1.\2", target) for target in targets)
    environment = {"SHARPKERN_CUDA": "", "TORCH_CUDA_ARCH_LIST": architectures, "MAX_JOBS": str(JOBS)}
    with mock.patch.dict(os.environ, environment), redirect_stdout(sys.stderr):
        toolkit = setup.find_toolkit(any_torch)
        if toolkit is None:
            print("nvcc was not found: the CUDA files are left out.")
            return
        try:
            objects = setup.compile_cuda(toolkit, Path("build/kernels"), include_paths())
        except SystemExit as error:  # nvcc has said why
            yield str(error)
            return
    for path in objects:
        # Where nvcc does not know a target, setup.py has said so, and taken others.
        yield from (line for line in read_object(path, ops) if isinstance(line, str) or line.target in targets)


# The report.


def render(rows: Sequence[Row]) -> str:
    """The table; an exclamation mark behind a row that breaks a rule."""
    head = ("", "kernel", "dtype", "target", *Usage._fields, "")
    lines = [head, *((*row[:4], *map(str, row.usage), "!" * bool(row.broken())) for row in rows)]
    return "\n".join(("{:6} {:48} {:8} {:6}" + 8 * "{:>10}").format(*line).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="default: %(default)s")
    parser.add_argument("--kernels", nargs="+", choices=ARRAYS, default=list(ARRAYS), help="ops; default: all")
    parser.add_argument("--only", choices=["triton", "cuda"], help="default: both")
    args = parser.parse_args()
    # Read when the kernels are imported, here and in the processes that compile them: they are not to be interpreted.
    for name in ("TRITON_INTERPRET", "SHARPKERN_BACKEND"):
        os.environ.pop(name, None)

    lines: list[Line] = []
    if args.only != "cuda":
        lines += triton_half(args.targets, args.kernels)
    nvidia = [name for name in args.targets if name.startswith("sm_")]
    if args.only != "triton" and nvidia:
        lines += cuda_half(nvidia, args.kernels)
    rows = [line for line in lines if isinstance(line, Row)]
    broken = [line for line in lines if isinstance(line, str)] + [rule for row in rows for rule in row.broken()]
    verdict = f"{len(broken)} times a rule is broken" if broken else "nothing spilled, no stack, 16 bytes wide"
    print(render(rows), "", *broken, f"{len(rows)} kernels: {verdict}.", sep="\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
