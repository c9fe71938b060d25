"""AE-SAM: SAM in the steps whose gradient is large."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adaptive import AdaptivePolicy
from .optimizer import TwoPassOptimizer
from .sam import SAM


class AESAM(AdaptivePolicy, SAM):
    r"""SAM with an adaptive policy: a SAM step where the squared gradient norm is large, a plain one elsewhere.

    .. math::
        n &= \|g\|_2^2, \qquad g = \nabla L_B(w) \\
        \mu &\leftarrow \delta \mu + (1 - \delta)\, n, \qquad
        \sigma^2 \leftarrow \delta \sigma^2 + (1 - \delta)(n - \mu)^2 \\
        c_t &= \tfrac{t}{T} \lambda_\text{end} + (1 - \tfrac{t}{T}) \lambda_\text{start} \\
        w &\leftarrow \begin{cases}
            \text{base}\bigl(w,\ \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon))\bigr) & n \ge \mu + c_t \sigma \\
            \text{base}(w,\ g) & \text{else}
        \end{cases}

    With the defaults about half of the steps are SAM steps, few at the start and most at the end. A lambda of
    ``-math.inf`` at both ends makes this :class:`sharpkern.SAM`, ``math.inf`` the base optimizer.

    A plain step takes one forward and backward pass and two launches; ``first_step`` returns False for it. The
    decision is the only number that the host reads of a step, so a step cannot be captured in a CUDA graph.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        total_steps: T, the number of steps of the whole training. After it the threshold stays as it is, and a
            warning says so once.
        lambda_start, lambda_end: how many standard deviations above the mean the threshold lies, at the start and
            at the end.
        decay: :math:`\delta` of the averages, in [0, 1).
        perturb_eps, model, max_grad_norm, skip_nonfinite, flatten: as in :class:`sharpkern.SAM`. A gradient that is
            not finite leaves the statistics alone, and ``first_step`` returns False for it.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Jiang et al. 2023, `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        total_steps: int,
        lambda_start: float = 1.0,
        lambda_end: float = -1.0,
        decay: float = 0.9,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self._adapt(total_steps, lambda_start, lambda_end, decay)
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho},
            perturb_eps=perturb_eps,
            model=model,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            base_kwargs=base_kwargs,
        )
