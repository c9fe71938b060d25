"""Each op alone, on its backends: bytes a second, as a share of what a plain copy reaches.

The calls wait in the device's queue before the first one starts, so that the host's time is not in them, and
walk through several sets of buffers, so that a cache does not hold what the next call reads.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import sharpkern as sk
from sharpkern.flat import FlatBuffers
from sharpkern.rules import FusedRule, make_rule

from ..baselines import BASES, ETA, PERTURB_EPS
from ..device import Function
from ..measure import compare
from ..shapes import Shape, count
from .run import COPY, Run, Timed

# What a set of buffers has to be larger than, all sets together: so many caches.
CACHES = 8

# Rows of the norms behind that of the first gradient.
LAST, DOT, G_V = 1, 2, 3

# The radius of timed calls: with a real one, hundreds of ascents in a row would run away to infinity.
STILL = 1e-9

ops = torch.ops.sharpkern


class Buffers:
    """Parameters, gradients and state in the middle of a step: perturbed, the weights in the backup."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, generator: torch.Generator) -> None:
        device = generator.device

        def random(shape: Shape, size: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, size, generator=generator)

        self.params = [random(shape, 0.05) for shape in shapes]
        for p in self.params:
            p.grad = random(tuple(p.size()), 0.01)
        n = len(self.params)
        self.flat = flat = FlatBuffers(self.params, [f"parameter {i}" for i in range(n)], [0] * n, [True] * n)
        flat.buffer("backup").normal_(0, 0.05, generator=generator)
        flat.buffer("gradient").normal_(0, 0.01, generator=generator)
        flat.buffer("g_v").normal_(0, 0.01, generator=generator)
        for name in ("momentum_buffer", "exp_avg_sq"):
            flat.buffer(name).uniform_(1e-5, 1e-4, generator=generator)
        # No op has both.
        flat.buffers["exp_avg"] = flat.buffers["momentum_buffer"]
        self.counters = torch.zeros(3, dtype=torch.int64, device=device)
        # Of both gradients, of their product, of g_v.
        self.norms = torch.zeros(4, 1, dtype=torch.float64, device=device)
        self.ema = torch.tensor([0.0, 1e-10, 0.0, 0.0], dtype=torch.float64, device=device)
        self.radius = torch.tensor([[STILL, ETA]], dtype=torch.float64, device=device)
        self.values = {}
        for base, (cls, options) in BASES.items():
            rule = make_rule(cls, options, (), "")
            assert isinstance(rule, FusedRule)
            row = rule.values(rule.defaults)
            self.values[base] = torch.tensor([row], dtype=torch.float64, device=device)
        flat.collect(lambda name, grad: RuntimeError(f"the gradient of {name} cannot be used"))
        for row in self.norms:
            _norm(self, row[0])
        self.norms[DOT] *= 0.5
        _ascend(self, "backup")
        flat.ascended()

    def changed(self, name: str) -> list[Tensor]:
        """The tensors behind a name in ``Kernel.writes``."""
        return {"params": self.params, "norms": [self.norms], "ema": [self.ema]}.get(name) or [self.flat.buffer(name)]


def _norm(b: Buffers, sq: Tensor) -> None:
    flat = b.flat
    ops.norm.default(sq, flat.partials, flat.lists[1], flat.rows, flat.blocks, dtype=flat.dtype)


def _norm_scaled(b: Buffers) -> None:
    flat = b.flat
    params, grads = flat.lists
    ops.norm_scaled.default(
        b.norms[0, 0], flat.partials, params, grads, flat.rows, flat.blocks, b.radius, dtype=flat.dtype
    )


def _norm_ema(b: Buffers) -> None:
    flat = b.flat
    ops.norm_ema.default(
        b.norms[0], flat.partials, b.ema, flat.lists[1], flat.rows, flat.blocks,
        buffer=0, decay=0.9, coefficient=1.0, dtype=flat.dtype,
    )  # fmt: skip


def _dots(b: Buffers) -> None:
    flat = b.flat
    ops.dots.default(
        b.norms[LAST : DOT + 1, 0], flat.partials, flat.buffer("gradient"), flat.lists[1], flat.rows, flat.blocks,
        dtype=flat.dtype,
    )  # fmt: skip


def _project(b: Buffers) -> None:
    flat = b.flat
    ops.project.default(
        flat.buffer("g_v"), b.norms[G_V, 0], flat.partials, flat.buffer("gradient"), flat.lists[1], flat.rows,
        flat.blocks, b.norms[:G_V], dtype=flat.dtype,
    )  # fmt: skip


def _ascend(b: Buffers, *kept: str) -> None:
    """``kept``: the buffers that it fills, of backup and gradient."""
    flat = b.flat
    _move(
        b, ops.ascend.default, *(flat.buffer(name) if name in kept else flat.empty for name in ("backup", "gradient"))
    )


def _ascend_scaled(b: Buffers) -> None:
    _move(b, ops.ascend_scaled.default, b.flat.buffer("backup"))


def _move(b: Buffers, op: Callable[..., None], *kept: Tensor) -> None:
    flat = b.flat
    params, grads = flat.lists
    op(
        params,
        *kept,
        b.counters,
        grads,
        flat.rows,
        flat.blocks,
        b.radius,
        b.norms[:1],
        eps=PERTURB_EPS,
        skip_nonfinite=True,
        dtype=flat.dtype,
    )


def _restore(b: Buffers) -> None:
    flat = b.flat
    ops.restore.default(flat.lists[0], flat.buffer("backup"), flat.rows, flat.blocks, dtype=flat.dtype)


def _sgd(b: Buffers, mixed: bool = False) -> None:
    _descend(b, ops.sgd.default, [b.flat.buffer("momentum_buffer")], b.values["sgd"], mixed)


def _adam(b: Buffers, mixed: bool = False) -> None:
    flat = b.flat
    state = [flat.buffer("exp_avg"), flat.buffer("exp_avg_sq"), flat.empty]
    _descend(b, ops.adam.default, state, b.values["adamw"], mixed)


def _descend(b: Buffers, op: Callable[..., None], state: list[Tensor], values: Tensor, mixed: bool) -> None:
    flat = b.flat
    params, grads = flat.lists
    op(
        params,
        *state,
        flat.step,
        b.counters,
        grads,
        flat.buffer("backup"),
        flat.buffer("g_v") if mixed else flat.empty,
        flat.rows,
        flat.blocks,
        values,
        b.norms[:DOT],
        b.norms[G_V:],
        alpha=0.2,
        max_norm=math.inf,
        skip_nonfinite=True,
        dtype=flat.dtype,
    )


@dataclass(frozen=True)
class Kernel:
    """One op, and what it moves for each parameter.

    Args:
        call: runs it once.
        elements: reads and writes of the parameters' dtype: weights, gradient, backup.
        states: reads and writes of state.
        writes: what it changes.
    """

    call: Callable[[Buffers], None]
    elements: int
    states: int
    writes: tuple[str, ...]

    def bytes_per_param(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize + self.states * (8 if dtype == torch.float64 else 4)


KERNELS: dict[str, Kernel] = {
    # g
    "norm": Kernel(lambda b: _norm(b, b.norms[0, 0]), 1, 0, ("norms",)),
    # w, g
    "norm_scaled": Kernel(_norm_scaled, 2, 0, ("norms",)),
    # w, g -> w, backup
    "ascend": Kernel(lambda b: _ascend(b, "backup"), 4, 0, ("params", "backup")),
    "ascend_scaled": Kernel(_ascend_scaled, 4, 0, ("params", "backup")),
    # backup -> w
    "restore": Kernel(_restore, 2, 0, ("params",)),
    # backup, g, m -> w, m
    "sgd": Kernel(_sgd, 3, 2, ("params", "momentum_buffer")),
    # backup, g, m, v -> w, m, v
    "adam": Kernel(_adam, 3, 4, ("params", "exp_avg", "exp_avg_sq")),
    # g
    "norm_ema": Kernel(_norm_ema, 1, 0, ("norms", "ema")),
    # w, g -> w
    "ascend, in place": Kernel(_ascend, 3, 0, ("params",)),
    # gradient, g
    "dots": Kernel(_dots, 2, 0, ("norms",)),
    # gradient, g -> g_v
    "project": Kernel(_project, 2, 1, ("norms", "g_v")),
    # backup, g, g_v, m -> w, m
    "sgd, mixed": Kernel(lambda b: _sgd(b, True), 3, 3, ("params", "momentum_buffer")),
    "adam, mixed": Kernel(lambda b: _adam(b, True), 3, 5, ("params", "exp_avg", "exp_avg_sq")),
    # w, g -> w, backup, gradient. The last one: dots and project want another gradient than this pass's.
    "ascend, gradient kept": Kernel(lambda b: _ascend(b, "backup", "gradient"), 5, 0, ("params", "backup", "gradient")),
}


def check(kernel: Kernel, buffers: Buffers, backend: str, what: str) -> None:
    """Compare one call with the reference's.

    Raises:
        WrongValues: when it computes something else.
    """
    tensors = [t for name in (*kernel.writes, "step") for t in _tensors(buffers, name)]
    before = [t.clone() for t in tensors]
    # Ten gradients far, whatever their number: no kernel that stays where it is passes.
    buffers.radius[0, 0] = 10 * buffers.norms[0].sum().sqrt()
    with sk.use_backend("reference"):
        kernel.call(buffers)
    expected = [t.clone() for t in tensors]
    for t, b in zip(tensors, before, strict=True):
        t.copy_(b)
    del before
    with sk.use_backend(backend):
        kernel.call(buffers)
    buffers.radius[0, 0] = STILL
    half = buffers.flat.dtype.itemsize == 2
    compare(tensors, expected, what, **({"rtol": 2**-7, "atol": 1e-4} if half else {}))


def _tensors(buffers: Buffers, name: str) -> list[Tensor]:
    return [buffers.flat.step] if name == "step" else buffers.changed(name)


def _sets(run: Run, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Buffers]:
    generator = torch.Generator(run.machine.torch_device).manual_seed(0)
    # Whatever an op reads, it reads the gradients, or as much.
    number = max(2, math.ceil(CACHES * run.machine.cache_bytes / (dtype.itemsize * count(list(shapes)))))
    return [Buffers(shapes, dtype, generator) for _ in range(number)]


def _in_turn(kernel: Kernel, sets: list[Buffers]) -> Function:
    turns = itertools.cycle(sets)
    return lambda: kernel.call(next(turns))


def run_kernels(run: Run) -> None:
    """Rows of every op, size and backend."""
    for label, shapes, dtype in run.plan.kernels:
        where = f"{label} {str(dtype).removeprefix('torch.')}"
        with run.attempt(f"buffers, {where}"):
            sets = _sets(run, shapes, dtype)
            for op, kernel in KERNELS.items():
                with run.attempt(f"{op}, {where}"):
                    _time(run, op, kernel, sets, label)
            del sets
        run.clean()


def _time(run: Run, op: str, kernel: Kernel, sets: list[Buffers], label: str) -> None:
    flat = sets[0].flat
    dtype = str(flat.dtype).removeprefix("torch.")
    functions = {}
    for backend in run.backends:
        # One that computes something else costs the others nothing.
        with run.attempt(f"{op}, {label} {dtype}, {backend}: not timed"):
            check(kernel, sets[0], backend, op)
            functions[backend] = Timed(_in_turn(kernel, sets), backend)
    times = run.time(functions, queued=True)
    params = sum(p.numel() for p in flat.params)
    for backend in functions:
        run.add(
            "kernel",
            [op, label, dtype, backend],
            times[backend],
            op=op,
            shape=label,
            tensors=len(flat.params),
            params=params,
            dtype=dtype,
            backend=backend,
            sets=len(sets),
            us=1e6 * statistics.median(times[backend]),
            ratio=statistics.median(times[backend]) / statistics.median(times[next(iter(functions))]),
            **run.rates(kernel.bytes_per_param(flat.dtype), params, times[backend], times[COPY]),
        )
