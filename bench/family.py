"""The kinds of step that AE-SAM, LookSAM and SALR take: ours, and as a loop over parameters would do it.

The loop takes the norm of the gradient for its decision and once more for the radius, and that of g_v whenever it
needs it, as scripts do.
Bytes are counted as in ``contenders.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sharpkern

from .baselines import BASES, PERTURB_EPS, RHO, Base, Loop

ALPHA = 0.2
STEP_SIZE, BRANCH = 0.002, 5
DECAY = 0.9

Step = Callable[[], object]


class Naive(Loop):
    """The loop, with what the methods add to it. A step leaves the gradients as they were."""

    def __init__(self, params: Sequence[Tensor], base: Base) -> None:
        super().__init__(params, "sam", base)
        self.g_v: dict[Tensor, Tensor] = {}
        self.mean, self.var = 0.0, 1e-10
        self.history: list[float] = []

    def _squared(self, tensors: Sequence[Tensor]) -> float:
        return float(torch.norm(torch.stack([t.norm(p=2) for t in tensors]), p=2)) ** 2

    @torch.no_grad()
    def _fires(self, lam: float) -> bool:
        n = self._squared([p.grad for p in self.params if p.grad is not None])
        self.mean = DECAY * self.mean + (1 - DECAY) * n
        self.var = DECAY * self.var + (1 - DECAY) * (n - self.mean) ** 2
        return n >= self.mean + lam * math.sqrt(self.var)

    def plain(self) -> None:
        self.base_optimizer.step()

    def ae_sam(self, lam: float) -> None:
        if self._fires(lam):
            self.first_step()
            self.second_step()
        else:
            self.base_optimizer.step()

    @torch.no_grad()
    def refresh(self, between: Callable[[], object] = lambda: None) -> None:
        first = {p: p.grad.clone() for p in self.params if p.grad is not None}
        self.first_step()
        between()
        product = sum((first[p] * p.grad).sum() for p in first if p.grad is not None)
        squared = sum(g.square().sum() for g in first.values())
        for p, g in first.items():
            if p.grad is not None:
                self.g_v[p] = p.grad - product / squared * g
        self.second_step()

    @torch.no_grad()
    def reuse(self) -> None:
        grads = {p: p.grad for p in self.params if p.grad is not None}
        factor = ALPHA * math.sqrt(self._squared(list(grads.values())) / self._squared(list(self.g_v.values())))
        for p, g in grads.items():
            p.grad = g + factor * self.g_v[p]
        self.base_optimizer.step()
        for p, g in grads.items():
            p.grad = g

    @torch.no_grad()
    def salr(self, closure: Callable[[], Tensor]) -> None:
        closure()
        first = {p: p.grad for p in self.params if p.grad is not None}
        old = {p: p.clone() for p in self.params}
        ends = []
        for sign in (-1, 1):
            for _ in range(BRANCH):
                norm = math.sqrt(self._squared([p.grad for p in self.params if p.grad is not None]))
                for p in self.params:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=sign * STEP_SIZE / (norm + PERTURB_EPS))
                ends.append(float(closure()))
            for p, w in old.items():
                p.copy_(w)
            for p, g in first.items():
                p.grad = g
        sharpness = ends[-1] - ends[BRANCH - 1]
        if sharpness > 0:
            self.history.append(sharpness)
        ratio = sharpness / statistics.median(self.history) if self.history else 1.0
        for group in self.base_optimizer.param_groups:
            lr, group["lr"] = group["lr"], group["lr"] * ratio
            self.base_optimizer.step()
            group["lr"] = lr


def _two_passes(optimizer: Any) -> Step:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def _make(cls: Any, params: Sequence[Tensor], base: Base, **own: Any) -> Any:
    rule, options = BASES[base]
    return cls(params, rule, perturb_eps=PERTURB_EPS, **own, **options)


def _ae_sam(lam: float) -> Callable[[Sequence[Tensor], Base], Step]:
    own = {"rho": RHO["sam"], "total_steps": 10**6, "lambda_start": lam, "lambda_end": lam, "decay": DECAY}

    def make(params: Sequence[Tensor], base: Base) -> Step:
        # By a closure: by hand a plain step has to measure the gradient once more.
        closure, optimizer = closure_over(params), _make(sharpkern.AESAM, params, base, **own)
        return lambda: optimizer.step(closure)

    return make


def _look_sam(params: Sequence[Tensor], base: Base, k: int = 1) -> Any:
    return _make(sharpkern.LookSAM, params, base, rho=RHO["sam"], k=k, alpha=ALPHA)


def _turn(params: Sequence[Tensor]) -> None:
    """Other gradients: with the same ones in both passes there would be no g_v."""
    for p in params:
        assert p.grad is not None
        p.grad = p.grad.flip(0)


def _between(params: Sequence[Tensor], base: Base) -> Step:
    """LookSAM that has its g_v and does not refresh again."""
    optimizer = _look_sam(params, base, k=10**9)
    optimizer.first_step()
    _turn(params)
    optimizer.second_step()
    _turn(params)
    return _two_passes(optimizer)


def _naive_between(params: Sequence[Tensor], base: Base) -> Step:
    naive = Naive(params, base)
    naive.refresh(lambda: _turn(params))
    _turn(params)
    return naive.reuse


def _naive_ae_sam(lam: float) -> Callable[[Sequence[Tensor], Base], Step]:
    def make(params: Sequence[Tensor], base: Base) -> Step:
        naive = Naive(params, base)
        return lambda: naive.ae_sam(lam)

    return make


def closure_over(params: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Gives the gradients that the parameters have now, and a loss that rises along them: no model in between."""
    grads = [p.grad for p in params]
    smallest = min(params, key=Tensor.numel)  # so that the loss itself takes no time
    start = smallest.detach().clone()
    direction = smallest.grad

    def closure() -> Tensor:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        with torch.no_grad():
            return ((smallest - start) * direction).sum()

    return closure


def _salr(params: Sequence[Tensor], base: Base) -> Step:
    closure = closure_over(params)
    optimizer = _make(sharpkern.SALR, params, base, n_ascent=BRANCH, n_descent=BRANCH, step_size=STEP_SIZE, every=1)
    return lambda: optimizer.step(closure)


def _bare(params: Sequence[Tensor], base: Base) -> Step:
    step: Step = _make(sharpkern.SAM, params, base, skip_nonfinite=False).step
    return step


def _naive_salr(params: Sequence[Tensor], base: Base) -> Step:
    closure, naive = closure_over(params), Naive(params, base)
    return lambda: naive.salr(closure)


@dataclass(frozen=True)
class Kind:
    """One kind of step.

    Args:
        ours, naive: build it on parameters that have gradients.
        bytes: a parameter, with SGD-momentum; the rule alone has 20 of them, with AdamW 28.
    """

    ours: Callable[[Sequence[Tensor], Base], Step]
    naive: Callable[[Sequence[Tensor], Base], Step]
    bytes: int

    def bytes_per_param(self, base: Base) -> int:
        return self.bytes + (8 if base == "adamw" else 0)


BARE = "base step alone"
KINDS: dict[str, Kind] = {
    BARE: Kind(_bare, lambda params, base: Naive(params, base).plain, 20),
    # The norm with the statistics 4.
    "AE-SAM, plain": Kind(_ae_sam(math.inf), _naive_ae_sam(1e30), 24),
    # The norm 4, ascend 16, the check 4.
    "AE-SAM, second pass": Kind(_ae_sam(-math.inf), _naive_ae_sam(-1e30), 44),
    # The norm 4, ascend 20, dots 8, project 12.
    "LookSAM, refresh": Kind(
        lambda params, base: _two_passes(_look_sam(params, base)), lambda params, base: Naive(params, base).refresh, 64
    ),
    # The norm 4, g_v 4.
    "LookSAM, in between": Kind(_between, _naive_between, 28),
    # Nine norms 36, a copy of the gradient 8, the first move 16, nine others 12 apiece, two restores 16.
    "SALR, measuring": Kind(_salr, _naive_salr, 204),
}
