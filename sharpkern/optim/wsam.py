"""WSAM: the sharpness that SAM adds to the loss, as a term of its own with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checks import check_real
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class WSAM(SharpnessAwareOptimizer):
    r"""Weighted SAM: minimize :math:`L + a\,(L_\text{SAM} - L)`, the loss and so much of its sharpness.

    .. math::
        g &= \nabla L_B(w), \qquad g_s = \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon)), \qquad
        a = \frac{\gamma}{1 - \gamma} \\
        \text{decoupled:}\quad w &\leftarrow \text{base}(w,\ g) - \eta\, a\, (g_s - g) \\
        \text{coupled:}\quad w &\leftarrow \text{base}(w,\ a\, g_s + (1 - a)\, g)

    Decoupled, the sharpness goes past the base rule's momentum and second moments, as AdamW's weight decay does;
    :math:`\eta` is the group's learning rate. Coupled with ``gamma=0.5`` this is :class:`sharpkern.SAM`, with
    ``gamma=0`` the base optimizer either way, as decoupled with ``rho=0``, at the price of both passes. A step that a
    ``policy`` leaves without a second pass is a plain one.

    A step takes two forward and backward passes. Decoupled: seven launches and, with SGD and momentum in float32, 68
    bytes a parameter; coupled: five and 52. The first gradient is held, 4 bytes a parameter; no state of its own. An
    interrupt may come between the two launches of a decoupled step: the base optimizer's part is taken then.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`. A wrapped one finds g, or the mixed gradient,
            in ``p.grad`` during its step; decoupled it needs a learning rate ``lr``.
        rho: radius of the ball; a group may have its own.
        gamma: the weight of the sharpness, from 0 up to 1, 1 excluded.
        decouple: see above.
        policy, perturb_eps, model, skip_nonfinite, flatten, m_sharpness, master_weights: as in :class:`sharpkern.SAM`.
        max_grad_norm: clip :math:`g_s` to this norm, by a factor that g shares.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Yue et al. 2023, `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term
    <https://arxiv.org/abs/2305.15817>`_.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        gamma: float = 0.9,
        decouple: bool = True,
        **kwargs: Any,
    ) -> None:
        check_real(gamma, "gamma")
        if not 0 <= gamma < 1:
            raise ValueError(f"Invalid gamma: {gamma}")
        if not isinstance(decouple, bool):
            raise TypeError(f"decouple should be a bool, but got {decouple!r}")
        self.gamma, self.decouple = float(gamma), decouple
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """WSAM: a step along g and one along the sharpness, a (g_s - g); or one along their sum."""
        a = self.gamma / (1 - self.gamma)
        if not self.wants_second_pass(step):
            yield AS_IS
            step.descend()
            return
        step.norm()
        step.ascend(keep_gradient=True)
        yield AGAIN
        if self.decouple:
            step.mix(constant=(0, 1))
            step.descend("gradient")
            step.mix(constant=(1, -1))  # without a radius it is 0, as a g_s - a g need not be in rounding
            step.shift("gradient", a)
        else:
            step.mix(constant=(a, 1 - a))
            step.descend("gradient")

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise for a group without the learning rate that a decoupled step takes, and for options out of range."""
        if self.decouple and group.get("lr") is None:
            base = self._step.rule.base.__name__
            raise ValueError(f"{base} has no learning rate lr for WSAM's sharpness: decouple=False needs none")
        super().check_options(group)
