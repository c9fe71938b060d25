"""SS-SAM: SAM in a random share of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..policy import Bernoulli
from .optimizer import TwoPassOptimizer
from .sam import SAM


class SSSAM(SAM):
    r"""Stochastic scheduled SAM: each step is a SAM step with probability p, a plain one otherwise.

    .. math::
        w \leftarrow \begin{cases}
            \text{base}\bigl(w,\ \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon))\bigr) & u_t < p(t) \\
            \text{base}(w,\ g) & \text{else}
        \end{cases} \qquad g = \nabla L_B(w)

    :math:`u_t`, uniform in [0, 1), depends on the seed and on the number of the step alone: every process draws
    the same, and a resumed run goes on where it was. With p = 1 this is :class:`sharpkern.SAM`, with p = 0 the
    base optimizer.

    A plain step takes one forward and backward pass and two launches. ``first_step`` returns False for it.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        p: the probability, or a function of the step's number (from 0), such as
            ``lambda t: 0.5 + 0.5 * math.cos(math.pi * t / total_steps)``.
        seed: of the draws.
        adaptive, perturb_eps, model, max_grad_norm, skip_nonfinite, flatten: as in :class:`sharpkern.SAM`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed; for what a function ``p``
            returns, in the step that asked for it, before that step changed anything.

    Source: Zhao et al. 2022, `SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for Efficiently Training
    Deep Neural Networks <https://arxiv.org/abs/2203.09962>`_.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        p: float | Callable[[int], float] = 0.5,
        seed: int = 0,
        adaptive: bool = False,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive},
            policy=Bernoulli(p, seed),
            perturb_eps=perturb_eps,
            model=model,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            base_kwargs=base_kwargs,
        )
