"""Momentum-SAM: the perturbation follows the base optimizer's momentum, so a step takes one gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..direction import Direction, Group
from ..memory.scalars import Sum
from ..rules import FusedRule
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, Passes, Step


class Onwards(Direction):
    """Where the base rule's momentum v is about to move the weights, along -v, by rho. ``maximize`` is in v already."""

    whole = "it goes along the whole momentum"

    def check(self, group: Group) -> None:
        super().check(group)
        if group.get("momentum") == 0:
            raise ValueError("MomentumSAM goes along the momentum of SGD: momentum should be above 0")

    def radius(self, group: Group) -> tuple[float, float]:
        return (group["rho"] if group.get("maximize") else -group["rho"]), 0.0


class MomentumSAM(SharpnessAwareOptimizer):
    r"""SAM along the momentum of the base optimizer: one forward and backward pass a step, as without SAM.

    .. math::
        w \leftarrow \text{base}\Bigl(w,\ \nabla L_B\bigl(w - \rho\, v / (\|v\|_2 + \epsilon)\bigr)\Bigr)

    v is SGD's ``momentum_buffer`` or Adam's and AdamW's ``exp_avg`` (without bias correction), as the step before left
    it. Without one, as in the first step, nothing is perturbed. The norm is over all parameters of all groups together.

    The weights are at home between two steps: evaluate, save and average them as always. ``step(closure)`` moves them,
    calls the closure, once, and brings them back. By hand, ``first_step`` comes before the backward, and returns True:
    a backward is wanted now::

        opt.first_step()
        loss_fn(model(x), y).backward()
        opt.second_step(zero_grad=True)

    A loop for two gradients works as well, and wastes the first of them.

    A step takes one forward and backward pass, four launches and, with SGD and momentum in float32, 44 bytes a
    parameter, 52 with Adam; a copy of v in the parameters' dtype more where that is a half type. The weights before the
    perturbation are held, 4 bytes a parameter; no state of its own. ``stats["second_passes"]`` is 0, and
    ``stats["grad_norm"]`` that of the one gradient.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: ``torch.optim.SGD`` with momentum, ``Adam`` or ``AdamW``: of a wrapped class nobody knows
            which state is its momentum.
        rho: the length of the perturbation; a group may have its own. In the paper 0.3 for ImageNet, up to 3 for SGD
            on CIFAR.
        perturb_eps, max_grad_norm, skip_nonfinite, flatten, master_weights: as in :class:`sharpkern.SAM`.
        model: no use: the buffers of a model are those of the one pass.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, and for a base optimizer without momentum, before anything
            changed.

    Source: Becker et al. 2024, `Momentum-SAM: Sharpness Aware Minimization without Computational Overhead
    <https://arxiv.org/abs/2401.12033>`_.
    """

    direction = Onwards()
    one_gradient = True
    refused = ("policy",)
    scalars = {"velocity": Sum()}  # ||v||^2

    def __init__(self, params: Any, base_optimizer: Any = torch.optim.SGD, rho: float = 0.3, **kwargs: Any) -> None:
        if "policy" in kwargs:
            raise TypeError("MomentumSAM takes no policy=: every step takes one gradient")
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """Momentum-SAM: step with the gradient at w - rho v / ||v||."""
        v = step.rule.buffers[0]
        if step.has(v):
            step.follow(v)
            step.ascend(along="velocity")
        yield AGAIN
        step.norm()
        step.descend()

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise for a base rule without momentum, and for options out of range."""
        rule = self._step.rule
        if not isinstance(rule, FusedRule):
            raise ValueError(
                f"{rule.base.__name__} cannot be the base optimizer of MomentumSAM, which goes along the momentum of "
                "torch.optim.SGD, Adam or AdamW"
            )
        super().check_options(group)
