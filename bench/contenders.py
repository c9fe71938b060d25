"""Who is measured: SAM and ASAM of every contender, the family's other kinds of step as ours and as a loop.

Each comes with the bytes of memory traffic a float32 parameter costs it, counted from the operations: 4 for every
element of every operand that an operation reads and every result that it writes, as if nothing stayed in the cache
from one operation to the next. Biases and norm layers (unscaled in ASAM) are counted like the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sharpkern as sk

from . import baselines
from .baselines import ALPHA, BASES, BRANCH, DECAY, PERTURB_EPS, RHO, STEP_SIZE, Algorithm, Base, Loop, TwoStep

OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """One column of the table of steps."""

    make: Callable[[Sequence[Tensor], Algorithm, Base], TwoStep]
    first: Mapping[Algorithm, int]  # bytes of the first pass
    second: Mapping[Base, int]  # bytes of the second pass
    on_device: int = 0  # further bytes where the host must not wait for a number
    slow_start: bool = False  # minutes of compilation
    # Base rules with which a CUDA graph can hold a step. Others swap pointers or number their steps on the host, as
    # foreach does for Adam's bias corrections: a graph would repeat the first ones.
    captured: tuple[Base, ...] = ()

    def bytes_per_param(self, algorithm: Algorithm, base: Base, device_type: str = "cpu") -> int | None:
        """None where this contender has no such algorithm."""
        further = self.on_device if device_type != "cpu" else 0
        return self.first[algorithm] + self.second[base] + further if algorithm in self.first else None


def _make(cls: Any, params: Sequence[Tensor], base: Base, **own: Any) -> Any:
    rule, options = BASES[base]
    return cls(params, rule, perturb_eps=PERTURB_EPS, **own, **options)


def _ours(params: Sequence[Tensor], algorithm: Algorithm, base: Base, **own: Any) -> TwoStep:
    cls = sk.SAM if algorithm == "sam" else sk.ASAM
    return _make(cls, params, base, rho=RHO[algorithm], **own)


# torch.optim one operation at a time, with a loop or with foreach.
# SGD: g + wd w 12, buf *= m 8, buf += g 12, w -= lr buf 12.
# AdamW: decay 8, lerp 12, v *= b 8, addcmul 12, sqrt 8, divide 8, add eps 8, addcdiv 16.
_TORCH: dict[Base, int] = {"sgd": 44, "adamw": 80}
# One kernel, torch's with fused=True, Inductor's or ours: reads w (or its backup), g and the state, writes w and state.
_FUSED: dict[Base, int] = {"sgd": 20, "adamw": 28}

# SAM: 1.0 * g 8, its norm 4; 1.0 * g 8, times scale 8, clone 8, add 12. ASAM: |w| + eta 16, times g 12, norm 4;
# again |w| + eta 16, square 8, times g 12, times scale 8, clone 8, add 12. The restore swaps a pointer.
_LOOP: dict[Algorithm, int] = {"sam": 48, "asam": 96}

# SAM: norm 4, backup 8, add with scale 12. ASAM: |w| + eta 16, times g 12, norm 4, times T 12, backup 8, add 12.
# On a device the scale costs a pass of its own: 8.
_FOREACH: dict[Algorithm, int] = {"sam": 24, "asam": 64}

CONTENDERS: dict[str, Contender] = {
    # norm: g 4, ASAM w too; ascend: reads w, g, writes w, backup 16; the check reads g again.
    OURS: Contender(_ours, {"sam": 24, "asam": 28}, _FUSED, captured=("sgd", "adamw")),
    "ours, no check": Contender(
        partial(_ours, skip_nonfinite=False), {"sam": 20, "asam": 24}, _FUSED, captured=("sgd", "adamw")
    ),
    "loop": Contender(Loop, _LOOP, _TORCH),
    "loop, fused base": Contender(partial(Loop, fused=True), _LOOP, _FUSED),
    # Restore 8; SGD: buf *= m 8, += g 12, += wd w 12, w -= lr buf 12; AdamW as torch's without the division.
    "foreach": Contender(baselines.Foreach, _FOREACH, {"sgd": 52, "adamw": 80}, on_device=8, captured=("sgd",)),
    # Restore 8.
    "foreach, fused base": Contender(
        partial(baselines.Foreach, fused=True), _FOREACH, {"sgd": 28, "adamw": 36}, on_device=8
    ),
    # Inductor fuses everything but the norm, which stays aten's: SAM 4 + (reads w, g, writes w, backup) 16; ASAM
    # writes T g for it, 12 more.
    "compile": Contender(baselines.make_compiled, {"sam": 20, "asam": 32}, _FUSED, slow_start=True),
    # Norm 4, 1.0 * g 8, times scale 8, clone 8, add 12, restore by copy 8.
    "pytorch_optimizer": Contender(baselines.make_pytorch_optimizer, {"sam": 48}, _TORCH),
    # Norm 4, g * scale 8, clone 8, add 12, restore by copy 8.
    "pytorch_optimizer, foreach": Contender(
        partial(baselines.make_pytorch_optimizer, foreach=True), {"sam": 40}, _TORCH
    ),
}


@dataclass(frozen=True)
class Kind:
    """One kind of step of the family, ours and the loop's, by a closure."""

    cls: Any  # ours
    own: Mapping[str, Any]  # its arguments
    loop: Mapping[str, Any]  # those of ``Loop.step``, for SALR of ``Loop.salr``
    bytes: int  # a parameter, with SGD-momentum
    bases: tuple[Base, ...] = ("sgd", "adamw")

    def bytes_per_param(self, base: Base) -> int:
        return self.bytes + _FUSED[base] - _FUSED["sgd"]

    def ours(self, params: Sequence[Tensor], base: Base, closure: baselines.Closure) -> Callable[[], object]:
        optimizer = _make(self.cls, params, base, **self.own)
        optimizer.zero_grad()  # the closure makes all of them
        return partial(optimizer.step, closure)

    def theirs(self, params: Sequence[Tensor], base: Base, closure: baselines.Closure) -> Callable[[], object]:
        loop = Loop(params, "sam", base)
        return partial(loop.salr if self.cls is sk.SALR else loop.step, closure, **self.loop)


class Nudged(Kind):
    """Along directions: here the elements of every parameter in turn, which are orthonormal."""

    def directions(self, params: Sequence[Tensor]) -> list[list[Tensor]]:
        k = self.own["k"]
        rows = [[torch.zeros_like(p).detach() for p in params] for _ in range(k)]
        for i, row in enumerate(rows):
            for e in row:
                e.view(-1)[i::k] = 1
            length = torch.stack([e.norm() for e in row]).norm()
            for e in row:
                e /= length
        return rows

    def ours(self, params: Sequence[Tensor], base: Base, closure: baselines.Closure) -> Callable[[], object]:
        optimizer = self.cls(params, **BASES[base][1], **self.own)
        optimizer.refresh(self.directions(params))
        optimizer.zero_grad()
        return partial(optimizer.step, closure)

    def theirs(self, params: Sequence[Tensor], base: Base, closure: baselines.Closure) -> Callable[[], object]:
        loop = Loop(params, "sam", base)
        return partial(loop.nudged, closure, self.directions(params), self.own["nudge"])


def _adaptive(trigger: float) -> dict[str, Any]:
    return {"total_steps": 10**6, "lambda_start": trigger, "lambda_end": trigger, "decay": DECAY}


def _salr(every: int) -> dict[str, Any]:
    return {"n_ascent": BRANCH, "n_descent": BRANCH, "step_size": STEP_SIZE, "every": every}


NEVER_AGAIN = 10**9
# With gradients that stay as they are: fires in the first step, which starts from a mean of 0, and not again.
ONCE = 9.0

LOOK = {"alpha": ALPHA}
BARE = "base step alone"
KINDS: dict[str, Kind] = {
    # Our rule's one kernel, without the check.
    BARE: Kind(sk.SSSAM, {"p": 0.0, "skip_nonfinite": False}, {}, 20),
    # The check 4.
    "SS-SAM, plain": Kind(sk.SSSAM, {"p": 0.0}, {}, 24),
    # The norm with the statistics 4.
    "AE-SAM, plain": Kind(sk.AESAM, _adaptive(math.inf), {"trigger": 1e30}, 24),
    # The norm 4, ascend 16, the check 4. SS-SAM's is the same, and SAM's.
    "AE-SAM, second pass": Kind(sk.AESAM, _adaptive(-math.inf), {"trigger": -1e30}, 44),
    # The norm 4, ascend 20, dots 8, project 12.
    "LookSAM, refresh": Kind(sk.LookSAM, {"k": 1, **LOOK}, {"every": 1, **LOOK}, 64),
    # The norm 4, g_v 4.
    "LookSAM, in between": Kind(sk.LookSAM, {"k": NEVER_AGAIN, **LOOK}, {"every": NEVER_AGAIN, **LOOK}, 28),
    "AE-LookSAM, refresh": Kind(sk.AELookSAM, {**_adaptive(-math.inf), **LOOK}, {"trigger": -1e30, **LOOK}, 64),
    "AE-LookSAM, in between": Kind(sk.AELookSAM, {**_adaptive(ONCE), **LOOK}, {"trigger": ONCE, **LOOK}, 28),
    # The norm 4.
    "SALR, plain": Kind(sk.SALR, _salr(NEVER_AGAIN), {"every": NEVER_AGAIN}, 24),
    # Nine norms 36, a copy of the gradient 8, the first move 16, nine others 12 apiece, two restores 16.
    "SALR, measuring": Kind(sk.SALR, _salr(1), {"every": 1}, 204),
    # w, g, m 12 and e 20 in both launches, w and m 8 in the second.
    "nudged SGD": Nudged(sk.NudgedSGD, {"k": 5, "nudge": 0.1}, {}, 72, ("sgd",)),
}
