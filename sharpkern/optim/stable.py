"""StableSAM: SAM whose gradient gets the length of the plain one."""

from __future__ import annotations

from typing import Any

import torch

from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class StableSAM(SharpnessAwareOptimizer):
    r"""SAM, with the gradient at the perturbed weights scaled to the norm of the gradient at the weights.

    .. math::
        g = \nabla L_B(w), \qquad g_s = \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon)), \qquad
        w \leftarrow \text{base}\Bigl(w,\ \frac{\|g\|_2}{\|g_s\|_2}\, g_s\Bigr)

    The direction is SAM's, the length of the step SGD's: near a minimum, where :math:`g_s` does not vanish, SAM
    leaves at learning rates that SGD stands. Both norms are over all parameters of all groups together. A :math:`g_s`
    of norm 1e-12 or less is a gradient of zero. A step that a ``policy`` leaves without a second pass is a plain one.

    A step takes two forward and backward passes, five launches and, with SGD and momentum in float32, 44 bytes a
    parameter: SAM's, and a launch for one number. No state of its own.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`. A wrapped one finds the scaled gradient in
            ``p.grad`` during its step.
        rho: radius of the ball; a group may have its own.
        policy, perturb_eps, model, skip_nonfinite, flatten, master_weights: as in :class:`sharpkern.SAM`.
        m_sharpness: as in :class:`sharpkern.SAM`. Where it is not "global", the squared norm of g is the mean of those
            of the processes' gradients.
        max_grad_norm: clip :math:`g_s` to this norm, before it is scaled: by the factor, then, that shortens it.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Tan et al. 2024, `Stabilizing Sharpness-aware Minimization Through A Simple Renormalization Strategy
    <https://arxiv.org/abs/2401.07250>`_.
    """

    def __init__(self, params: Any, base_optimizer: Any = torch.optim.SGD, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """StableSAM: step with ||g|| / ||g_s|| g_s."""
        if self.wants_second_pass(step):
            step.norm()
            step.ascend()
            yield AGAIN
            step.mix("first", "last", constant=(0, 0), slope=(1, 0), root=True)
        else:
            yield AS_IS
        step.descend()
