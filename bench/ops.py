"""Cases of each op alone, on its backends: bytes a second, as a share of what a plain copy reaches.

``python -m bench.ops`` calls every op once on each backend at 25 M parameters, for a profiler to look at. All that
the benches know of the package's inside is ``Layout``, which has the ops' arguments by their names in the schemas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import sharpkern as sk
from sharpkern.memory.layout import Layout as Memory
from sharpkern.ops import schema
from sharpkern.rules import make_rule

from .baselines import ALPHA, BASES, DECAY, ETA, PERTURB_EPS
from .measure import Case, Function, Prepared, Run, Subject, compare, on
from .models import Shape, count

# The radius of timed calls: with a real one, hundreds of ascents in a row would run away to infinity.
STILL = 1e-9
# q of the ball of p = 3.
Q = 1.5
# Written by ops as they like.
SCRATCH = ("partials", "table", "counters")
DIRECTIONS = 5  # that nudged SGD has


class Layout:
    """Parameters, gradients and state in the middle of a step: perturbed, the weights in the backup."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.params = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        for p in self.params:
            p.normal_(0, 0.05, generator=generator)
            p.grad = torch.empty_like(p).normal_(0, 0.01, generator=generator)
        n = len(self.params)
        self.memory = memory = Memory(self.params, [f"parameter {i}" for i in range(n)], [0] * n, [True] * n)
        memory.partials = torch.zeros(
            schema.partials_size(memory.size, len(memory.blocks), DIRECTIONS), dtype=torch.float64, device=device
        )
        with on("reference"):  # which looks at lists: it takes turns with the others on these gradients
            memory.collect(lambda name, grad: RuntimeError(f"the gradient of {name} cannot be used"))
        scalars = partial(torch.tensor, dtype=torch.float64, device=device)
        self.radius = scalars([[STILL, ETA]])
        # Squared: of the first gradient, of the last one, their product, of g_v; one buffer.
        self.norms = norms = torch.zeros(4, 1, dtype=torch.float64, device=device)
        self.sq = {"norm": norms[0], "norm_scaled": norms[0], "norm_max": norms[0], "norm_p": norms[3, 0],
                   "dots": norms[1:3, 0], "project": norms[3, 0], "combine": norms[3, 0], "ascend": norms[:1],
                   "ascend_scaled": norms[:1], "ascend_p": norms[:1], "sgd": norms[:2], "adam": norms[:2]}  # fmt: skip
        self.sq |= {"nudge_dots": norms[1, 0], "nudge_sgd": norms[:2]}
        self.values: dict[str, Tensor] = {}
        for op, (cls, options) in zip(("sgd", "adam"), BASES.values(), strict=True):
            rule = make_rule(cls, options, (), "")
            self.values[op] = scalars([rule.values(rule.defaults)])  # type: ignore[union-attr]
        sgd = self.values["sgd"]
        self.values["nudge_dots"] = self.values["nudge_sgd"] = torch.cat([sgd, sgd.new_full((1, 1), 0.1)], 1)
        self.named: dict[str, Any] = {
            "partials": memory.partials, "step": torch.zeros(n, device=device), "max_exp_avg_sq": memory.empty,
            "counters": torch.zeros(3, dtype=torch.int64, device=device), "ema": scalars([0.0, 1e-10, 0.0, 0.0]),
            "radius": self.radius, "products": norms[:3], "coefficients": scalars([1.0, ALPHA]),
            "largest": torch.stack([p.grad.abs().max() for p in self.params]).max().double()[None],
            "powers": scalars([float(sum(p.numel() for p in self.params))]), "q": Q, "exponent": Q - 1,
            "master": memory.empty, "eps": PERTURB_EPS, "skip_nonfinite": True, "max_norm": math.inf, "buffer": 0,
            "decay": DECAY, "coefficient": 1.0, "dtype": dtype,
        }  # fmt: skip
        for name, spread in (("backup", 0.05), ("gradient", 0.01), ("g_v", 0.01)):
            self.named[name] = memory.buffer(name).normal_(0, spread, generator=generator)
        for name in ("momentum_buffer", "exp_avg_sq"):
            self.named[name] = memory.buffer(name).uniform_(1e-5, 1e-4, generator=generator)
        self.named["eigenvectors"] = memory.buffer("g_v").new_empty(DIRECTIONS, memory.size)
        self.named["eigenvectors"].normal_(0, memory.size**-0.5, generator=generator)
        self.along = torch.zeros(2 * DIRECTIONS, 1, dtype=torch.float64, device=device)
        self.named["exp_avg"] = self.named["momentum_buffer"]  # no op has both
        self.named["direction"] = self.named["v"] = self.named["g_v"]  # nor these
        self.named |= {"out": memory.buffer("direction").zero_(), "x": memory.empty, "checks": norms[:2]}
        for row in norms:
            self.sq["norm"] = row
            self.bind("norm", without=("ema",))[0]()
        self.sq["norm"] = norms[0]
        norms[2] *= 0.5
        self.bind("ascend", without=("gradient",))[0]()
        memory.table.after_ascent()

    def bind(self, op: str, without: Sequence[str] = ()) -> tuple[Function, list[Tensor]]:
        """A call of an op on the backend in charge, with empty buffers ``without``, and the tensors that it writes."""
        walk = dict(zip(("params", "grads", "table", "blocks"), self.memory.walk, strict=True))
        known = {**self.named, **dict.fromkeys(without, self.memory.empty), **walk}
        known |= {"sq": self.sq.get(op), "values": self.values.get(op)}
        known["along"] = self.along[:, 0] if op == "nudge_dots" else self.along
        call = getattr(torch.ops.sharpkern, op).default
        arguments = call._schema.arguments
        by_name = {a.name: known[a.name] for a in arguments if a.kwarg_only}
        written = [a.name for a in arguments if a.alias_info and a.alias_info.is_write and a.name not in SCRATCH]
        tensors = [t for name in written for t in (self.params if name == "params" else [known[name]])]
        return partial(call, *(known[a.name] for a in arguments if not a.kwarg_only), **by_name), tensors


@dataclass(frozen=True)
class Kernel:
    """One op, and what it moves for each parameter."""

    op: str  # its name in the schemas
    elements: int  # reads and writes of the parameters' dtype: weights, gradient, backup
    states: int = 0  # of state
    without: tuple[str, ...] = ()  # buffers that it does not get

    def bytes_per_param(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize + self.states * (8 if dtype == torch.float64 else 4)


KERNELS: dict[str, Kernel] = {
    "norm": Kernel("norm", 1, without=("ema",)),  # g
    "norm_scaled": Kernel("norm_scaled", 2, without=("ema",)),  # w, g
    "ascend": Kernel("ascend", 4, without=("gradient",)),  # w, g -> w, backup
    "ascend_scaled": Kernel("ascend_scaled", 4),
    "restore": Kernel("restore", 2),  # backup -> w
    "sgd": Kernel("sgd", 3, 2, ("direction", "coefficients")),  # backup, g, m -> w, m
    "adam": Kernel("adam", 3, 4, ("direction", "coefficients")),  # backup, g, m, v -> w, m, v
    "norm, statistics": Kernel("norm", 1),  # g
    "ascend, in place": Kernel("ascend", 3, without=("backup", "gradient")),  # w, g -> w
    "norm_max": Kernel("norm_max", 1, without=("ema",)),  # g
    "norm_p": Kernel("norm_p", 1),
    "ascend_p": Kernel("ascend_p", 4),  # w, g -> w, backup
    "dots": Kernel("dots", 2),  # gradient, g
    "project": Kernel("project", 2, 1),  # gradient, g -> g_v
    "sgd, mixed": Kernel("sgd", 3, 3),  # backup, g, g_v, m -> w, m
    "adam, mixed": Kernel("adam", 3, 5),
    "nudge_dots": Kernel("nudge_dots", 2, 1 + DIRECTIONS),  # w, g, m, e
    "nudge_sgd": Kernel("nudge_sgd", 3, 2 + DIRECTIONS),  # w, g, m, e -> w, m
    # w, g -> w, backup, gradient. The last one: dots and project want another gradient than this pass's.
    "ascend, gradient kept": Kernel("ascend", 5),
    "combine": Kernel("combine", 1, 2, without=("x",)),  # g, v -> out
}


def check(name: str, layout: Layout, backend: str) -> Function:
    """A call on a backend, which gives what the reference's gives; WrongValues where it does not."""
    kernel = KERNELS[name]
    # Ten gradients far, whatever their number: no kernel that stays where it is passes.
    layout.radius[0, 0] = 10 * layout.norms[0].sum().sqrt()
    with on("reference"):
        call, tensors = layout.bind(kernel.op, kernel.without)
        before = [t.clone() for t in tensors]
        call()
    expected = [t.clone() for t in tensors]
    for t, b in zip(tensors, before, strict=True):
        t.copy_(b)
    with on(backend):
        call, _ = layout.bind(kernel.op, kernel.without)
        call()
    layout.radius[0, 0] = STILL
    half = layout.params[0].dtype.itemsize == 2
    compare(tensors, expected, name, **({"rtol": 2**-7, "atol": 1e-4} if half else {}))
    return call


def kernels(run: Run) -> Iterator[Case]:
    """Every op, size and backend; a backend takes turns with those before it."""

    def prepare(op: str, layout: Callable[[], Layout], backend: str, before: dict[str, Subject]) -> Prepared:
        subject = (check(op, layout(), backend), backend)
        beside = dict(before)
        before[backend] = subject
        return subject, beside, {"tensors": len(layout().params)}

    for label, shapes, dtype in run.plan.kernels:
        layout = cache(partial(Layout, shapes, dtype, run.machine.device))
        for op, kernel in KERNELS.items():
            checked: dict[str, Subject] = {}
            for backend in run.backends:
                labels = {"kind": "kernel", "shape": label, "method": op, "dtype": str(dtype).removeprefix("torch.")}
                build = partial(prepare, op, layout, backend, checked)
                size = kernel.bytes_per_param(dtype)
                yield Case({**labels, "contender": backend}, count(shapes), size, build, device_only=True)


if __name__ == "__main__":
    layout = Layout([(25_000_000,)], torch.float32, torch.device("cuda"))
    for profiling in (nullcontext(), torch.cuda.profiler.profile()):  # first modules load, and Triton compiles
        with profiling:
            for backend in {"cpp", "triton"} & set(sk.available_backends("cuda")):
                with on(backend):
                    for kernel in KERNELS.values():
                        layout.bind(kernel.op, kernel.without)[0]()
            torch.cuda.synchronize()
