"""AE-LookSAM: LookSAM that refreshes in the steps whose gradient is large."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adaptive import AdaptivePolicy
from .looksam import LookSAM
from .optimizer import TwoPassOptimizer


class AELookSAM(AdaptivePolicy, LookSAM):
    r""":class:`sharpkern.LookSAM` with the trigger of :class:`sharpkern.AESAM` in place of every k-th step.

    .. math::
        n = \|g\|_2^2 \ge \mu + c_t \sigma:&\quad
        w \leftarrow \text{base}(w,\ g_s), \qquad g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|_2^2}\, g \\
        \text{else:}&\quad w \leftarrow \text{base}\Bigl(w,\ g + \alpha \frac{\|g\|_2}{\|g_v\|_2}\, g_v\Bigr)

    with :math:`\mu, \sigma, c_t` of :class:`sharpkern.AESAM`. Before the first :math:`g_v` a step that is not triggered
    is a plain one. With the defaults about one step in five is a SAM step.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer, rho, alpha: as in :class:`sharpkern.LookSAM`.
        total_steps, lambda_start, lambda_end, decay: as in :class:`sharpkern.AESAM`.
        perturb_eps, model, max_grad_norm, skip_nonfinite, flatten: as in :class:`sharpkern.LookSAM`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Jiang et al. 2023, `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_.
    """

    _kept_tensors = (*LookSAM._kept_tensors, "_ema")
    _kept = (*LookSAM._kept, "_adaptive", "_warned")
    _statistics_shapes = {**LookSAM._statistics_shapes, **AdaptivePolicy._statistics_shapes}

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        total_steps: int,
        alpha: float = 0.7,
        lambda_start: float = 2.0,
        lambda_end: float = 0.0,
        decay: float = 0.9,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self._adapt(total_steps, lambda_start, lambda_end, decay)
        self._reuse(alpha)
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
