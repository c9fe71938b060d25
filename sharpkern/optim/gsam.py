"""GSAM: the gradient at the perturbed weights, less the part of the plain one that does not point along it."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_number
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class GSAM(SharpnessAwareOptimizer):
    r"""Surrogate-gap guided SAM: descend the perturbed loss and, orthogonally to that, ascend the plain one.

    .. math::
        g &= \nabla L_B(w), \qquad g_s = \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon)) \\
        g_\perp &= g - \frac{\langle g, g_s \rangle}{\|g_s\|_2^2}\, g_s, \qquad
        w \leftarrow \text{base}(w,\ g_s - \alpha\, g_\perp)

    The difference of the two losses, the surrogate gap, measures sharpness: the step along :math:`-g_\perp` shrinks it
    and changes the perturbed loss in no first order. One scalar product over all parameters of all groups together. A
    :math:`g_s` of norm 1e-12 or less is projected on as if it were zero. With ``alpha=0`` this is
    :class:`sharpkern.SAM`. A step that a ``policy`` leaves without a second pass is a plain one.

    A step takes two forward and backward passes, five launches and, with SGD and momentum in float32, 56 bytes a
    parameter.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`. A wrapped one finds the mixed gradient in
            ``p.grad`` during its step.
        rho: radius of the ball; a group may have its own. The paper lets it fall with the learning rate: write
            ``group["rho"]`` as a scheduler would.
        alpha: how much of :math:`g_\perp` is taken away.
        policy, perturb_eps, model, skip_nonfinite, flatten, m_sharpness, master_weights: as in :class:`sharpkern.SAM`.
        max_grad_norm: clip :math:`g_s` to this norm, by a factor that :math:`g_\perp` shares.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Zhuang et al. 2022, `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        alpha: float = 0.4,
        **kwargs: Any,
    ) -> None:
        check_number(alpha, "alpha")
        self.alpha = float(alpha)
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """GSAM: step with g_s - alpha g_perp, which is (1 + alpha <g, g_s> / ||g_s||^2) g_s - alpha g."""
        if self.wants_second_pass(step):
            step.norm()
            step.ascend(keep_gradient=True)
            yield AGAIN
            step.dots()
            step.mix("dot", "last", constant=(1, -self.alpha), slope=(self.alpha, 0))
            step.descend("gradient")
        else:
            yield AS_IS
            step.descend()
