"""Friendly-SAM: the perturbation follows what a batch's gradient has beside the running average of all."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_number, check_probability
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class FriendlySAM(SharpnessAwareOptimizer):
    r"""SAM along the noise of the batch's gradient: its part that all batches share is taken away first.

    .. math::
        g &= \nabla L_B(w), \qquad d = g - \sigma\, m, \qquad m \leftarrow \lambda\, m + (1 - \lambda)\, g \\
        w &\leftarrow \text{base}\bigl(w,\ \nabla L_B(w + \rho\, d / (\|d\|_2 + \epsilon))\bigr)

    d is made with the m of before this step; in the first one :math:`d = g` and :math:`m = g`. With ``sigma=0`` this is
    :class:`sharpkern.SAM`. The norm is over all parameters of all groups together; ``stats["grad_norm"]`` is that of d.
    m moves when a step is taken, in one that a ``policy`` leaves without a second pass not: that one is plain. A
    parameter whose first gradient comes in a later step has an m of zeros.

    A step takes two forward and backward passes, seven launches (two of them for a number) and, with SGD and momentum
    in float32, 64 bytes a parameter. It holds m and d, 8 bytes a parameter.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        sigma: how much of m is taken away.
        lam: :math:`\lambda`, how much of m stays in a step, from 0 to 1.
        policy, perturb_eps, model, max_grad_norm, skip_nonfinite, flatten, m_sharpness, master_weights: as in
            :class:`sharpkern.SAM`.
        **base_kwargs: options of the base optimizer.

    State: ``opt.state[p]["friendly_m"]``, m in float32 (float64 for float64 parameters), parameter-shaped.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Li et al. 2024, `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_.
    """

    state_names = ("friendly_m",)

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        lam: float = 0.9,
        **kwargs: Any,
    ) -> None:
        check_number(sigma, "sigma")
        check_probability(lam, "lam")
        self.sigma, self.lam = float(sigma), float(lam)
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """Friendly-SAM: SAM along d = g - sigma m; then m = lam m + (1 - lam) g, where g = d + sigma m."""
        if self.wants_second_pass(step):
            step.combine("direction", "friendly_m", 1, -self.sigma)
            step.follow("direction")
            step.ascend()
            yield AGAIN
            fresh = 1 - self.lam
            step.combine("friendly_m", "friendly_m", fresh, self.lam + fresh * self.sigma, x="direction")
        else:
            yield AS_IS
        step.descend()
