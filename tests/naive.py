"""SAM and ASAM written from the papers, one parameter at a time, over torch's own base optimizers.

Deliberately slow and plain: the oracle of the trajectory tests. Nothing here comes from the package.
"""

from __future__ import annotations

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
