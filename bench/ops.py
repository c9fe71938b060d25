"""Each op alone, on its backends: bytes a second, as a share of what a plain copy reaches.

``python -m bench.ops`` calls every op once on each backend at 25 M parameters, for a profiler to look at.
All that the benches know of the package's inside is in this file: ``Layout`` prepares what the ops' arguments
are, by the names they have in the schemas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import sharpkern as sk
from sharpkern.flat import FlatBuffers
from sharpkern.rules import FusedRule, make_rule

from .baselines import ALPHA, BASES, DECAY, ETA, PERTURB_EPS
from .measure import Case, Function, Run, Subject, compare, on
from .models import Shape, count

# Rows of the norms behind that of the first gradient: of the last one, of their product, of g_v.
LAST, DOT, G_V = 1, 2, 3

# The radius of timed calls: with a real one, hundreds of ascents in a row would run away to infinity.
STILL = 1e-9


class Layout:
    """Parameters, gradients and state in the middle of a step: perturbed, the weights in the backup."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(shape: Shape, size: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, size, generator=generator)

        self.params = [random(shape, 0.05) for shape in shapes]
        for p in self.params:
            p.grad = random(tuple(p.size()), 0.01)
        n = len(self.params)
        self.flat = flat = FlatBuffers(self.params, [f"parameter {i}" for i in range(n)], [0] * n, [True] * n)
        flat.collect(lambda name, grad: RuntimeError(f"the gradient of {name} cannot be used"))
        scalars = partial(torch.tensor, dtype=torch.float64, device=device)
        self.norms = torch.zeros(4, 1, dtype=torch.float64, device=device)
        self.radius = scalars([[STILL, ETA]])
        self.named: dict[str, Any] = {
            "partials": flat.partials,
            "blocks": flat.blocks,
            "step": flat.step,
            "counters": torch.zeros(3, dtype=torch.int64, device=device),
            "ema": scalars([0.0, 1e-10, 0.0, 0.0]),
            "radius": self.radius,
            "norms": self.norms,
            "products": self.norms[:G_V],
            "g_v_sq": self.norms[G_V:],
            "max_exp_avg_sq": flat.empty,
            "eps": PERTURB_EPS, "skip_nonfinite": True, "alpha": ALPHA, "max_norm": math.inf,
            "buffer": 0, "decay": DECAY, "coefficient": 1.0, "dtype": dtype,
        }  # fmt: skip
        for name, spread in (("backup", 0.05), ("gradient", 0.01), ("g_v", 0.01)):
            self.named[name] = flat.buffer(name).normal_(0, spread, generator=generator)
        for name in ("momentum_buffer", "exp_avg_sq"):
            self.named[name] = flat.buffer(name).uniform_(1e-5, 1e-4, generator=generator)
        self.named["exp_avg"] = self.named["momentum_buffer"]  # no op has both
        self.values: dict[str, Tensor] = {}
        for op, (cls, options) in zip(("sgd", "adam"), BASES.values(), strict=True):
            rule = make_rule(cls, options, (), "")
            assert isinstance(rule, FusedRule)
            self.values[op] = scalars([rule.values(rule.defaults)])
        for row in self.norms:
            self.bind("norm", sq=row[0])()
        self.norms[DOT] *= 0.5
        self.bind("ascend", gradient=flat.empty, sq=self.norms[:1])()
        flat.ascended()

    def bind(self, op: str, **own: Any) -> Function:
        """A call of an op on the backend in charge, its arguments from this layout but for ``own``."""
        params, grads = self.flat.lists
        known = {**self.named, "params": params, "grads": grads, "table": self.flat.rows, **own}
        if op in self.values:
            known["values"] = self.values[op]
        call = getattr(torch.ops.sharpkern, op).default
        wanted = call._schema.arguments
        args = [known[a.name] for a in wanted if not a.kwarg_only]
        return partial(call, *args, **{a.name: known[a.name] for a in wanted if a.kwarg_only})

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """What stands behind names in ``Kernel.writes``."""
        return [t for name in names for t in (self.params if name == "params" else [self.named[name]])]


@dataclass(frozen=True)
class Kernel:
    """One op, and what it moves for each parameter.

    Args:
        op: its name in the schemas.
        elements: reads and writes of the parameters' dtype: weights, gradient, backup.
        states: reads and writes of state.
        writes: what it changes.
        own: arguments in place of the layout's.
    """

    op: str
    elements: int
    states: int
    writes: tuple[str, ...]
    own: Callable[[Layout], dict[str, Any]]

    def bytes_per_param(self, dtype: torch.dtype) -> int:
        return self.elements * dtype.itemsize + self.states * (8 if dtype == torch.float64 else 4)

    def bind(self, layout: Layout) -> Function:
        return layout.bind(self.op, **self.own(layout))


def _first(b: Layout) -> dict[str, Any]:
    return {"sq": b.norms[0, 0]}


def _of_move(*without: str) -> Callable[[Layout], dict[str, Any]]:
    """The norm of the first gradient; no buffer under these names."""
    return lambda b: {"sq": b.norms[:1], **dict.fromkeys(without, b.flat.empty)}


def _of_rule(*without: str) -> Callable[[Layout], dict[str, Any]]:
    """The norms of both gradients."""
    return lambda b: {"sq": b.norms[:DOT], **dict.fromkeys(without, b.flat.empty)}


_ADAM = ("params", "exp_avg", "exp_avg_sq", "step")
KERNELS: dict[str, Kernel] = {
    # g
    "norm": Kernel("norm", 1, 0, ("norms",), _first),
    # w, g
    "norm_scaled": Kernel("norm_scaled", 2, 0, ("norms",), _first),
    # w, g -> w, backup
    "ascend": Kernel("ascend", 4, 0, ("params", "backup"), _of_move("gradient")),
    "ascend_scaled": Kernel("ascend_scaled", 4, 0, ("params", "backup"), _of_move()),
    # backup -> w
    "restore": Kernel("restore", 2, 0, ("params",), lambda b: {}),
    # backup, g, m -> w, m
    "sgd": Kernel("sgd", 3, 2, ("params", "momentum_buffer", "step"), _of_rule("g_v")),
    # backup, g, m, v -> w, m, v
    "adam": Kernel("adam", 3, 4, _ADAM, _of_rule("g_v")),
    # g
    "norm_ema": Kernel("norm_ema", 1, 0, ("norms", "ema"), lambda b: {"sq": b.norms[0]}),
    # w, g -> w
    "ascend, in place": Kernel("ascend", 3, 0, ("params",), _of_move("backup", "gradient")),
    # gradient, g
    "dots": Kernel("dots", 2, 0, ("norms",), lambda b: {"sq": b.norms[LAST : DOT + 1, 0]}),
    # gradient, g -> g_v
    "project": Kernel("project", 2, 1, ("norms", "g_v"), lambda b: {"sq": b.norms[G_V, 0]}),
    # backup, g, g_v, m -> w, m
    "sgd, mixed": Kernel("sgd", 3, 3, ("params", "momentum_buffer", "step"), _of_rule()),
    "adam, mixed": Kernel("adam", 3, 5, _ADAM, _of_rule()),
    # w, g -> w, backup, gradient. The last one: dots and project want another gradient than this pass's.
    "ascend, gradient kept": Kernel("ascend", 5, 0, ("params", "backup", "gradient"), _of_move()),
}


def check(kernel: Kernel, layout: Layout, backend: str, what: str) -> Function:
    """A call on a backend, which gives what the reference's gives.

    Raises:
        WrongValues: when it computes something else.
    """
    tensors = layout.tensors(kernel.writes)
    before = [t.clone() for t in tensors]
    # Ten gradients far, whatever their number: no kernel that stays where it is passes.
    layout.radius[0, 0] = 10 * layout.norms[0].sum().sqrt()
    with on("reference"):
        kernel.bind(layout)()
    expected = [t.clone() for t in tensors]
    for t, b in zip(tensors, before, strict=True):
        t.copy_(b)
    del before
    with on(backend):
        call = kernel.bind(layout)
        call()
    layout.radius[0, 0] = STILL
    half = layout.flat.dtype.itemsize == 2
    compare(tensors, expected, what, **({"rtol": 2**-7, "atol": 1e-4} if half else {}))
    return call


def kernels(run: Run) -> Iterator[Case]:
    """Every op, size and backend; a backend takes turns with those before it."""

    def prepare(
        op: str, layout: Callable[[], Layout], backend: str, before: dict[str, Subject]
    ) -> tuple[Subject, dict[str, Subject], dict[str, Any]]:
        subject = Subject(check(KERNELS[op], layout(), backend, op), backend)
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


def call_all(layout: Layout) -> None:
    for backend in sk.available_backends(layout.flat.device):
        if backend != "reference":
            with on(backend):
                for kernel in KERNELS.values():
                    kernel.bind(layout)()


if __name__ == "__main__":
    layout = Layout([(25_000_000,)], torch.float32, torch.device("cuda"))
    call_all(layout)  # modules load, Triton compiles
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        call_all(layout)
        torch.cuda.synchronize()
