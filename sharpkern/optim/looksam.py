"""LookSAM: the second gradient of one step, used again in the next ones."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_number
from ..policy import Every, Policy, choose
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class LookSAM(SharpnessAwareOptimizer):
    r"""SAM every k steps; in between the part of its gradient that pointed elsewhere is added to the plain gradient.

    .. math::
        g &= \nabla L_B(w) \\
        t \bmod k = 0:\quad g_s &= \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon)), \qquad
        g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|_2^2}\, g, \qquad w \leftarrow \text{base}(w,\ g_s) \\
        \text{else:}\quad w &\leftarrow \text{base}\Bigl(w,\ g + \alpha \frac{\|g\|_2}{\|g_v\|_2}\, g_v\Bigr)

    One scalar product over all parameters of all groups together, as in the paper; not one a tensor. A zero gradient
    leaves :math:`g_v` as it was; a :math:`g_v` of norm 1e-12 or less is not added.

    A refresh takes two forward and backward passes and five launches, a step in between one pass and three launches;
    ``first_step`` returns False for it.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`. A wrapped one finds the mixed gradient in
            ``p.grad`` during its step.
        rho: radius of the ball; a group may have its own.
        k: one step in k (5) is a SAM step, the first one included. With k = 1 this is :class:`sharpkern.SAM`.
        alpha: how much of :math:`g_v`, in norms of g. 0.7 was tuned for vision transformers; take 0.1 to 0.3 for
            convolutional networks with SGD.
        policy: which steps refresh, in place of ``k``, a :mod:`sharpkern.policy`.
        perturb_eps, model, skip_nonfinite, flatten, m_sharpness, master_weights: as in :class:`sharpkern.SAM`.
        max_grad_norm: clip the gradient of the last pass to this norm, before :math:`g_v` is added.
        **base_kwargs: options of the base optimizer.

    State: ``opt.state[p]["g_v"]``, float32 (float64 for float64 parameters), parameter-shaped.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Liu et al. 2022, `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_.
    """

    state_names = ("g_v",)

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        k: int | None = None,
        alpha: float = 0.7,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        check_number(alpha, "alpha")
        self.alpha = float(alpha)
        policy = choose(policy, lambda: Every(5 if k is None else k), k=k)
        super().__init__(params, base_optimizer, {"rho": rho}, policy=policy, **kwargs)

    def passes(self, step: Step) -> Passes:
        """LookSAM: a SAM step that refreshes g_v, or a plain one with g_v added to the gradient."""
        if self.wants_second_pass(step):
            step.norm()
            step.ascend(keep_gradient=True)
            yield AGAIN
            step.dots()
            step.project("g_v")
            step.descend()
            return
        yield AS_IS
        if self.alpha > 0 and step.has("g_v"):
            # g + alpha ||g|| / ||g_v|| g_v
            step.mix("last", "g_v", constant=(1, 0), slope=(0, self.alpha), root=True)
            step.descend("g_v")
        else:
            step.descend()
