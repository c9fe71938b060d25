"""SAM, ASAM and the rest of the family written from the papers, one parameter at a time, over torch's optimizers.

Deliberately slow and plain: the oracle of the trajectory tests. Nothing here comes from the package.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Naive:
    """Two-pass step over ``torch.optim``: Foret et al. 2021 and Kwon et al. 2021.

    Args:
        groups: torch parameter groups, with ``rho`` (and ``eta``).
        base: torch optimizer class.
        scale: T_w of (name, weights, group).
        names: one a parameter.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        base: type[torch.optim.Optimizer],
        scale: Callable[[str, Tensor, dict[str, Any]], Tensor | float],
        names: dict[Tensor, str],
        max_grad_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {"foreach": False, **kwargs} if base.__module__.startswith("torch.") else kwargs
        self.base = base([{k: v for k, v in g.items() if k not in ("rho", "eta")} for g in groups], **kwargs)
        self.own = groups
        self.scale = scale
        self.names = names
        self.max_grad_norm = max_grad_norm

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self.base.zero_grad()
        loss = closure()
        with torch.no_grad():
            entries = []
            total = 0.0
            for group, options in zip(self.own, self.base.param_groups, strict=True):
                for p in options["params"]:
                    if p.grad is None:
                        continue
                    t = self.scale(self.names[p], p, group)
                    total += float((t * p.grad).double().pow(2).sum())
                    sign = -1.0 if options["maximize"] else 1.0
                    entries.append((p, p.detach().clone(), sign * group["rho"] * t * t * p.grad))
            norm = total**0.5
            for p, _, direction in entries:
                p.add_(direction / (norm + 1e-12))
        self.base.zero_grad()
        closure()
        with torch.no_grad():
            for p, old, _ in entries:
                p.copy_(old)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for g in self.base.param_groups for p in g["params"]], self.max_grad_norm)
        self.base.step()
        return loss


def plain(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
    """SAM: T_w = 1."""
    return 1.0


def magnitude(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
    """The common port's adaptive=True: T_w = |w|."""
    return w.abs()


def asam(name: str, w: Tensor, group: dict[str, Any]) -> Tensor | float:
    """The authors' ASAM: T_w = |w| + eta on weights."""
    return w.abs() + group["eta"] if "weight" in name else 1.0


class NaiveFamily:
    """The methods that take their second pass now and then, and SALR: Jiang et al. 2023, Liu et al. 2022, Zhao et al.
    2022, Yue et al. 2020. One parameter at a time, with everything that is summed over them in float64.

    Args:
        groups: torch parameter groups, with ``rho``.
        base: torch optimizer class.
        fires: of (step, squared norm) whether the second pass is taken.
        alpha: LookSAM's; None: a step without a second pass is a plain one.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        base: type[torch.optim.Optimizer],
        fires: Callable[[int, float], bool],
        alpha: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.base = base([{k: v for k, v in g.items() if k != "rho"} for g in groups], foreach=False, **kwargs)
        self.rho = [group["rho"] for group in groups]
        self.fires = fires
        self.alpha = alpha
        self.t = 0
        self.decisions: list[bool] = []
        self.g_v: dict[Tensor, Tensor] = {}

    def gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.grad.clone() for g in self.base.param_groups for p in g["params"] if p.grad is not None}

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self.base.zero_grad()
        loss = closure()
        g = self.gradients()
        n = sum(float(x.double().pow(2).sum()) for x in g.values())
        fired = self.fires(self.t, n)
        self.t += 1
        self.decisions.append(fired)
        if fired:
            old = {p: p.detach().clone() for p in g}
            for group, rho in zip(self.base.param_groups, self.rho, strict=True):
                for p in group["params"]:
                    if p in g:
                        p.data.add_(g[p], alpha=(-rho if group["maximize"] else rho) / (n**0.5 + 1e-12))
            self.base.zero_grad()
            closure()
            for p, w in old.items():
                p.data.copy_(w)
            if self.alpha is not None and n > 0:
                g_s = self.gradients()
                product = sum(float((g[p].double() * g_s[p].double()).sum()) for p in g if p in g_s)
                self.g_v = {
                    p: g_s.get(p, torch.zeros_like(p)) - product / n * g.get(p, torch.zeros_like(p))
                    for p in {**g, **g_s}
                }
        elif self.alpha is not None:
            norm = sum(float(v.double().pow(2).sum()) for v in self.g_v.values()) ** 0.5
            if norm > 1e-12:
                for p, v in self.g_v.items():
                    if p.grad is not None:
                        p.grad = p.grad + self.alpha * n**0.5 / norm * v
        self.base.step()
        return loss


def ae_sam(total_steps: int, start: float, end: float, decay: float) -> Callable[[int, float], bool]:
    """AE-SAM's rule, with the mean first and the variance around the new mean."""
    mean, var = 0.0, 1e-10

    def fires(t: int, n: float) -> bool:
        nonlocal mean, var
        mean = decay * mean + (1 - decay) * n
        var = decay * var + (1 - decay) * (n - mean) ** 2
        c = t / total_steps * end + (1 - t / total_steps) * start
        return n >= mean + c * var**0.5

    return fires


class NaiveSALR:
    """SALR over a torch optimizer, whose groups' learning rate is scaled for each step."""

    def __init__(
        self,
        params: list[Tensor],
        base: type[torch.optim.Optimizer],
        n_ascent: int = 5,
        n_descent: int = 5,
        step_size: float = 0.002,
        every: int = 2,
        **kwargs: Any,
    ) -> None:
        self.params = params
        self.base = base(params, foreach=False, **kwargs)
        self.lr = [group["lr"] for group in self.base.param_groups]
        self.branches = {-1.0: n_descent, 1.0: n_ascent}
        self.step_size = step_size
        self.every = every
        self.t = 0
        self.history: list[float] = []
        self.ratio = 1.0

    def branch(self, sign: float, closure: Callable[[], Tensor]) -> float:
        """The loss at the end of a branch."""
        for _ in range(self.branches[sign]):
            self.base.zero_grad()
            closure()
            norm = sum(float(p.grad.double().pow(2).sum()) for p in self.params if p.grad is not None) ** 0.5
            for p in self.params:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=sign * self.step_size / (norm + 1e-12))
        return float(closure().detach())

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        if self.t % self.every == 0:
            old = [p.detach().clone() for p in self.params]
            ends = []
            for sign in self.branches:
                ends.append(self.branch(sign, closure))
                for p, w in zip(self.params, old, strict=True):
                    p.data.copy_(w)
            sharpness = ends[1] - ends[0]
            if sharpness > 0:
                self.history.append(sharpness)
                self.ratio = sharpness / statistics.median(self.history)
        self.t += 1
        self.base.zero_grad()
        loss = closure()
        for group, lr in zip(self.base.param_groups, self.lr, strict=True):
            group["lr"] = lr * self.ratio
        self.base.step()
        return loss
