"""VaSSO: the perturbation follows a running average of the gradients, which varies less than the batch's."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_real
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class VaSSO(SharpnessAwareOptimizer):
    r"""Variance-suppressed SAM: along a running average of the gradients, not along that of one batch.

    .. math::
        d \leftarrow (1 - \theta)\, d + \theta\, \nabla L_B(w), \qquad
        w \leftarrow \text{base}\bigl(w,\ \nabla L_B(w + \rho\, d / (\|d\|_2 + \epsilon))\bigr)

    In the first step d is the gradient. With ``theta=1`` this is :class:`sharpkern.SAM`. The norm is over all
    parameters of all groups together; ``stats["grad_norm"]`` is that of d. d moves when a step is taken, in one that a
    ``policy`` leaves without a second pass not: that one is plain. A parameter whose first gradient comes in a later
    step has a d of zeros before it.

    A step takes two forward and backward passes, seven launches (two of them for a number) and, with SGD and momentum
    in float32, 64 bytes a parameter. It holds d twice, 8 bytes a parameter: a step may be given up.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        theta: :math:`\theta`, the share of the newest gradient, above 0 and up to 1.
        policy, perturb_eps, model, max_grad_norm, skip_nonfinite, flatten, m_sharpness, master_weights: as in
            :class:`sharpkern.SAM`.
        **base_kwargs: options of the base optimizer.

    State: ``opt.state[p]["vasso_d"]``, d in float32 (float64 for float64 parameters), parameter-shaped.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Li and Giannakis 2023, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
    <https://arxiv.org/abs/2309.15639>`_.
    """

    state_names = ("vasso_d",)

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        theta: float = 0.4,
        **kwargs: Any,
    ) -> None:
        check_real(theta, "theta")
        if not 0 < theta <= 1:
            raise ValueError(f"Invalid theta: {theta}")
        self.theta = float(theta)
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """VaSSO: SAM along d = (1 - theta) d + theta g, which is kept."""
        if self.wants_second_pass(step):
            step.combine("direction", "vasso_d", self.theta, 1 - self.theta)
            step.follow("direction")
            step.ascend()
            yield AGAIN
            step.combine("vasso_d", "vasso_d", 1, 0, x="direction")
        else:
            yield AS_IS
        step.descend()
