"""SAM, ASAM and SS-SAM: sharpness-aware minimization, along the gradient, in units of the weights, now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..direction import Direction, Magnitude, PNorm, Weights
from ..policy import Bernoulli, Policy, choose
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class SharpnessAwareStep(SharpnessAwareOptimizer):
    """The step of SAM, whatever its direction and its policy."""

    def move_in_ball(self, p: float) -> None:
        """Perturbations have a p-norm of rho. Before the optimizer is made; of the 2-norm nothing changes."""
        if p != 2:
            self.direction = PNorm(p, self.direction.options)

    def passes(self, step: Step) -> Passes:
        """SAM: step with the gradient at the perturbed weights, from the weights."""
        if self.wants_second_pass(step):
            step.norm()
            step.ascend()
            yield AGAIN
        else:
            yield AS_IS
        step.descend()


class SAM(SharpnessAwareStep):
    r"""Sharpness-aware minimization: step with the gradient at the worst point of a small ball.

    .. math::
        e = \rho \, \frac{g}{\|g\|_2 + \epsilon}, \qquad
        w \leftarrow \text{base}\bigl(w,\ \nabla L_B(w + e)\bigr), \qquad g = \nabla L_B(w)

    The norm is over all parameters of all groups together; each group has its own :math:`\rho`. Both
    gradients are of the same batch. Weight decay belongs to the base rule. With ``maximize`` the
    perturbation follows :math:`-g`.

    ``adaptive=True`` scales every tensor by its own magnitude, :math:`e = \rho\, w^2 g / \| |w| g \|` (no
    eta; rho is about 2 then). The authors' ASAM is :class:`sharpkern.ASAM`.

    ``p`` is another norm of the ball, :math:`\|e\|_p = \rho`; with :math:`q = p / (p - 1)`

    .. math::
        e = \rho \, \operatorname{sign}(g) \left( \frac{|g|}{\|g\|_q + \epsilon} \right)^{q - 1}, \qquad
        p = \infty: \quad e = \rho \, \operatorname{sign}(g), \qquad \operatorname{sign}(0) = 0

    A ball of :math:`p = \infty` of the same :math:`\rho` is larger by the square root of the number of parameters: take
    a smaller :math:`\rho` there. Elements are compared with the largest one, so nothing overflows for any p; powers
    are float32 (float64 for float64 parameters), to about :math:`q\, 10^{-7}`. ``stats["grad_norm"]`` and what a policy
    measures is :math:`\|g\|_2` whatever p is. Another p than 2 and infinity takes one launch and one read of the
    gradient more.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class. Exactly ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are fused; any
            other class is wrapped and its own ``step`` called after a fused restore.
        rho: radius of the ball, in units of the weights; a group may have its own.
        adaptive: elementwise scaling, see above; a group may have its own. Not with another p than 2.
        p: of the ball's norm, above 1, up to ``math.inf``; one for all groups. Not with ``perturb`` where it is not 2.
        policy: which steps take the second pass, a :mod:`sharpkern.policy`; every one without.
        perturb_eps: :math:`\epsilon`, against division by zero.
        model: when given, its buffers (norm statistics, spectral norm's vectors, observers, codebooks) are after a
            step what the first pass left, see :func:`sharpkern.frozen_buffers`. A step of one pass copies nothing.
        max_grad_norm: clip the second gradient to this norm.
        skip_nonfinite: a step that meets an infinite or NaN gradient in any pass changes nothing and is
            counted in ``stats["skipped_steps"]``. Costs a read of the second gradient.
        flatten: move parameters and, in each pass, gradients into flat buffers; undone by ``unflatten()``.
            Not of DTensors.
        perturb: which parameters move between the passes, a function of a parameter's name (None without names) and the
            parameter itself, asked when the optimizer lays them out. The norm is over those; what the others' first
            gradients are, finite or not, is not looked at. All are updated. A group option ``perturb=False`` leaves a
            group out, too. SAM-ON: ``perturb=sharpkern.norm_layers(model)``.
        m_sharpness: whose gradient the weights move along before the second pass, where ``model`` is under
            ``DistributedDataParallel``. "global": that of the joint batch, :math:`g = \frac1R \sum_r g_r`. "rank": each
            process its own, :math:`e_r = \rho\, g_r / \|g_r\|`, and the step is along
            :math:`\frac1R \sum_r \nabla L_r(w + e_r)`: the paper's m-sharpness, and half of the communication; a first
            gradient that is not finite moves nothing there. Or a process group: its processes share one. "replica":
            each copy of a sharded model its own, see :func:`sharpkern.replicate`. By hand ``first_pass`` is needed.
        master_weights: keep float32 masters of bfloat16 and float16 parameters, ``opt.state[p]["master"]``, from which
            the weights are perturbed and which the base rule steps on; the parameters are their rounded values. That
            takes 2 bytes a parameter more: the masters are the backup, too. Not with a wrapped base optimizer.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Example::

        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        loss = opt.step(closure)  # closure: forward, backward, return the loss

    Source: Foret et al. 2021, `Sharpness-Aware Minimization for Efficiently Improving Generalization
    <https://arxiv.org/abs/2010.01412>`_.
    """

    direction: Direction = Magnitude()

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        p: float = 2.0,
        **kwargs: Any,
    ) -> None:
        self.move_in_ball(p)
        super().__init__(params, base_optimizer, {"rho": rho, "adaptive": adaptive}, **kwargs)


class ASAM(SharpnessAwareStep):
    r"""Adaptive SAM: the ball is measured in units of each weight, so rescaling a layer changes nothing.

    .. math::
        e = \rho \, \frac{T_w^2 g}{\|T_w g\|_2 + \epsilon}, \qquad T_w = |w| + \eta

    on tensors whose name contains ``weight`` (norm layers' scales included); :math:`T_w = 1` on the others.
    Names come from (name, tensor) pairs, as ``model.named_parameters()`` gives them; without names, tensors
    of two or more dimensions are scaled. ``stats["grad_norm"]`` is :math:`\|T_w g\|_2`.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius; a group may have its own.
        eta: added to the magnitude, so that a zero weight can move; a group may have its own.
        policy, perturb_eps, model, max_grad_norm, skip_nonfinite, flatten, perturb, m_sharpness, master_weights: as in
            :class:`sharpkern.SAM`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Kwon et al. 2021, `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
    Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_.
    """

    direction = Weights()

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.5,
        eta: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "eta": eta}, **kwargs)


class SSSAM(SAM):
    r"""Stochastic scheduled SAM: each step is a SAM step with probability p, a plain one otherwise.

    .. math::
        w \leftarrow \begin{cases}
            \text{base}\bigl(w,\ \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon))\bigr) & u_t < p(t) \\
            \text{base}(w,\ g) & \text{else}
        \end{cases} \qquad g = \nabla L_B(w)

    :math:`u_t`, uniform in [0, 1), depends on the seed and on the number of the step alone: every process draws
    the same, and a resumed run goes on where it was. With p = 1 this is :class:`sharpkern.SAM`, with p = 0 the
    base optimizer. The norm of the ball is the 2-norm; for another one give :class:`sharpkern.SAM` its ``p`` and
    ``policy=Bernoulli(...)``.

    A plain step takes one forward and backward pass and two launches. ``first_step`` returns False for it.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        p: the probability (0.5), or a function of the step's number (from 0), such as
            ``lambda t: 0.5 + 0.5 * math.cos(math.pi * t / total_steps)``.
        seed: of the draws (0).
        adaptive, policy, perturb_eps, model, max_grad_norm, skip_nonfinite, flatten, perturb, m_sharpness,
            master_weights: as in :class:`sharpkern.SAM`. A policy takes the place of ``p`` and ``seed``.
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
        p: float | Callable[[int], float] | None = None,
        seed: int | None = None,
        adaptive: bool = False,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        policy = choose(policy, lambda: Bernoulli(0.5 if p is None else p, 0 if seed is None else seed), p=p, seed=seed)
        super().__init__(params, base_optimizer, rho, adaptive, policy=policy, **kwargs)
