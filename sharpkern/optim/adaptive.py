"""AE-SAM and AE-LookSAM: the second pass in the steps whose gradient is large."""

from __future__ import annotations

from typing import Any

import torch

from ..direction import Part
from ..policy import Adaptive, refuse
from .looksam import LookSAM
from .sam import SharpnessAwareStep


class AESAM(SharpnessAwareStep):
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

    With the defaults about half of the steps are SAM steps, few in the first half and most in the second one. Both
    averages start at 0, which makes SAM steps of about the first eight: of a run of 30 steps that is nearly all. A
    lambda of ``-math.inf`` at both ends makes this :class:`sharpkern.SAM`, ``math.inf`` the base optimizer.

    A plain step takes one forward and backward pass and two launches; ``first_step`` returns False for it. The
    decision is the only number that the host reads of a step, so a step cannot be captured in a CUDA graph.

    Clip by ``max_grad_norm=``. Gradients that are clipped before ``first_step``, or in a closure, have one norm: the
    policy has nothing left to tell them by.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        total_steps: T, the number of steps of the whole training. After it the threshold stays as it is, and a
            warning says so once.
        lambda_start, lambda_end: how many standard deviations above the mean the threshold lies, at the start and
            at the end.
        decay: :math:`\delta` of the averages, in [0, 1).
        p: of the ball's norm, as in :class:`sharpkern.SAM`; n is the squared 2-norm whatever it is.
        perturb_eps, model, max_grad_norm, skip_nonfinite, flatten, master_weights: as in :class:`sharpkern.SAM`. A
            gradient that is not finite leaves the statistics alone, and ``first_step`` returns False for it.
        m_sharpness: as in :class:`sharpkern.SAM`. Where it is not "global", n is the mean of the squared norms of the
            processes' gradients: another statistic, larger than that of the mean gradient.
        perturb: as in :class:`sharpkern.SAM`; n is then of the parameters that are perturbed.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Jiang et al. 2023, `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_.
    """

    direction = Part()
    refused = ("policy",)

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
        p: float = 2.0,
        **kwargs: Any,
    ) -> None:
        refuse(self, kwargs, *self.refused)
        self.move_in_ball(p)
        policy = Adaptive(total_steps, lambda_start, lambda_end, decay)
        super().__init__(params, base_optimizer, {"rho": rho}, policy=policy, **kwargs)


class AELookSAM(LookSAM):
    r""":class:`sharpkern.LookSAM` with the trigger of :class:`sharpkern.AESAM` in place of every k-th step.

    .. math::
        n = \|g\|_2^2 \ge \mu + c_t \sigma:&\quad
        w \leftarrow \text{base}(w,\ g_s), \qquad g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|_2^2}\, g \\
        \text{else:}&\quad w \leftarrow \text{base}\Bigl(w,\ g + \alpha \frac{\|g\|_2}{\|g_v\|_2}\, g_v\Bigr)

    with :math:`\mu, \sigma, c_t` of :class:`sharpkern.AESAM`. Before the first :math:`g_v` a step that is not triggered
    is a plain one. With the defaults about one step in five is a SAM step, in short runs more. Clip by
    ``max_grad_norm=``, as with :class:`sharpkern.AESAM`.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer, rho, alpha: as in :class:`sharpkern.LookSAM`.
        total_steps, lambda_start, lambda_end, decay: as in :class:`sharpkern.AESAM`.
        perturb_eps, model, max_grad_norm, skip_nonfinite, flatten, m_sharpness, master_weights: as in
            :class:`sharpkern.LookSAM`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Jiang et al. 2023, `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_.
    """

    refused = ("policy", "k")

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
        **kwargs: Any,
    ) -> None:
        refuse(self, kwargs, *self.refused)
        policy = Adaptive(total_steps, lambda_start, lambda_end, decay)
        super().__init__(params, base_optimizer, rho, alpha=alpha, policy=policy, **kwargs)
