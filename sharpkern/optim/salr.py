"""SALR: a learning rate that follows the sharpness of the loss."""

from __future__ import annotations

import bisect
import math
import numbers
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..direction import Nowhere
from ..distributed import processes
from ..memory.scalars import Sum
from ..policy import refuse
from ..rules import FusedRule
from .accumulation import kept
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, Passes, Step, Wish

ALONE = (
    "SALR in several processes compares the losses of each process by itself, so that their learning rates differ: "
    "give model= the model under DistributedDataParallel. Where the processes train apart, or the closure returns the "
    "mean of their losses, it does no harm"
)


class SALR(SharpnessAwareOptimizer):
    r"""Sharpness-aware learning rates: a base optimizer that takes large steps in sharp valleys, small ones in flat.

    .. math::
        \theta^\pm_0 = w, \qquad
        \theta^\pm_{i+1} &= \theta^\pm_i \pm \gamma\, \frac{\nabla L_B(\theta^\pm_i)}{\|\nabla L_B(\theta^\pm_i)\|_2} \\
        S &= L_B(\theta^+_{n_\text{ascent}}) - L_B(\theta^-_{n_\text{descent}}) \\
        \eta &= \eta_0\, \frac{S}{\text{median}(S_1, \ldots, S_m)}, \qquad S = S_m, \qquad
        w \leftarrow \text{base}_\eta(w,\ \nabla L_B(w))

    Every so many steps S is measured on the step's own batch; weights, optimizer state and, with ``model=``, its
    buffers are afterwards what they were, to the bit. The ratio is held until the next measurement; 1 at the start.
    The median is over all measurements, the current one included, and exact. An S that is not positive, or not
    finite, is not recorded and changes nothing. :math:`\eta_0` is the group's ``lr``, which is never written to: a
    scheduler moves it as always. The ratio reaches AdamW's weight decay, too.

    The ratio has no bound in the paper, and it can feed itself: a large step leads to where S is larger, which makes
    the next step larger, before the median follows. RMSprop, whose steps keep their length whatever the gradient, is
    prone to it. ``max_lr_scale`` bounds it.

    A measurement takes ``n_ascent + n_descent`` forward and backward passes more; the gradient at w is shared by both
    branches and by the training step. Models with dropout draw anew in every pass, which S measures along.

    With ``maximize`` in the first group S is that of the loss with its sign turned.

    It is stepped by a closure only, which returns the loss and is called in every pass: ``first_step`` and
    ``second_step`` raise. S is the only number that the host reads, once a measurement.

    ``master_weights=True`` is refused: a branch adds up steps from where the model is, and a half type has not the
    digits for that.

    SAM as the base is refused. S is measured at w and scales a step along the gradient at w; SAM steps along another
    one, and already seeks out a small S. Nobody has published the combination, so there is no recursion to be true to.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`; one that has a learning rate ``lr``.
        n_ascent, n_descent: steps of the two branches.
        step_size: :math:`\gamma`, the length of each, in units of the weights.
        every: one step in so many measures, the first one included.
        max_lr_scale: the ratio is this at most; None: whatever it is.
        perturb_eps: added to the norm of a branch's gradient, against division by zero.
        model, max_grad_norm, flatten: as in :class:`sharpkern.SAM`.
        skip_nonfinite: a step that meets an infinite or NaN gradient in a pass whose gradient is followed (all but
            the ends of the branches) changes nothing, the history included, and is counted in
            ``stats["skipped_steps"]``.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, and in a step for a closure that does not return one
            number, before anything changed.

    Under ``DistributedDataParallel``, which ``model=`` has to be, S is of the mean loss of all processes, and so it is
    where parameters are DTensors: one all-reduce of three numbers a measurement.

    ``opt.stats`` has, of the last measurement that was recorded, ``sharpness``, S (NaN before), and ``lr_scale``, the
    ratio (1 before).

    Source: Yue et al. 2020, `SALR: Sharpness-aware Learning Rate Scheduler for Improved Generalization
    <https://arxiv.org/abs/2011.05348>`_.
    """

    direction = Nowhere()
    closure_only = True
    refused = ("policy", "master_weights")

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        *,
        n_ascent: int = 5,
        n_descent: int = 5,
        step_size: float = 0.002,
        every: int = 2,
        max_lr_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        for name, count in (("n_ascent", n_ascent), ("n_descent", n_descent), ("every", every)):
            check_count(count, name)
        check_number(step_size, "step_size", positive=True)
        if max_lr_scale is not None:
            check_number(max_lr_scale, "max_lr_scale", positive=True)
        refuse(self, kwargs, "policy")
        if kwargs.pop("master_weights", False):
            raise TypeError(
                "SALR takes no master_weights=True: its branches add up steps from where the model is, and a half type "
                "has not the digits for that"
            )
        self.n_ascent, self.n_descent, self.every = int(n_ascent), int(n_descent), int(every)
        self.step_size = float(step_size)
        self.max_lr_scale = math.inf if max_lr_scale is None else float(max_lr_scale)
        # The squared norms of the branches' gradients; every S in ascending order; the last S, and the ratio.
        self.norms = tuple(f"branch_{i}" for i in range(n_descent - 1 + n_ascent - 1))
        self.scalars = {**dict.fromkeys(self.norms, Sum()), "history": [], "sharpness": math.nan, "lr_scale": 1.0}
        super().__init__(params, base_optimizer, {}, **kwargs)

    def passes(self, step: Step) -> Passes:
        """SALR: now and then S of the step's own batch, then the base rule's step with its learning rate scaled."""
        check_loss(step.loss)
        step.norm()
        skip = False
        if step.t % self.every == 0 and step.has_gradients:
            grads = step.copy_gradients()  # of both branches and of the training step
            try:
                sharpness, finite = yield from self.measure(step, grads)
            finally:
                step.back()
                step.put_gradients(grads)
            skip = step.settings.skip_nonfinite and not finite
            if not skip:
                self.record(step, sharpness)
        if skip:
            step.skip()
        else:
            step.descend()

    def measure(self, step: Step, grads: Mapping[Tensor, Tensor]) -> Generator[Wish, Any, tuple[float, bool]]:
        """(S, whether every gradient that was followed is finite)."""
        lowest = yield from self.branch(step, -self.step_size, self.norms[: self.n_descent - 1])
        step.rewind()
        step.put_gradients(grads)
        highest = yield from self.branch(step, self.step_size, self.norms[self.n_descent - 1 :])
        if processes() > 1 and step.everybody is None:
            step.warn_once(ALONE)
        low, high, finite = step.read(lowest, highest, step.all_finite("first", *self.norms), mean=True)
        return (low - high if self.param_groups[0].get("maximize") else high - low), finite == 1

    def branch(self, step: Step, length: float, norms: Sequence[str]) -> Generator[Wish, Any, Any]:
        """The loss after steps of a length along the gradient: along the one at w, and one for each of the sums."""
        step.ascend(length)
        for norm in norms:
            yield AGAIN
            step.norm(norm)
            step.ascend(length, along=norm)
        loss = yield AGAIN
        return kept(loss)

    def record(self, step: Step, sharpness: float) -> None:
        """Set the ratio, S over the median of all S; one that is not positive, or not finite, changes nothing."""
        if math.isfinite(sharpness) and sharpness > 0:
            history = step.scalars["history"]
            bisect.insort(history, sharpness)
            last = len(history) - 1
            # The mean of the middle two, or twice the middle one.
            median = (history[last // 2] + history[(last + 1) // 2]) / 2
            step.scalars["sharpness"] = sharpness
            step.scalars["lr_scale"] = min(sharpness / median, self.max_lr_scale)

    def _take_numbers(self, loaded: dict[str, Any]) -> None:
        super()._take_numbers(loaded)
        scalars = self._step.scalars
        scalars["lr_scale"] = min(scalars["lr_scale"], self.max_lr_scale)  # it may be of a run without the bound

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise for a group without a learning rate, and for options out of range."""
        rule = self._step.rule
        if not isinstance(rule, FusedRule) and group.get("lr") is None:
            raise ValueError(f"{rule.base.__name__} has no learning rate lr for SALR to scale")
        super().check_options(group)


def check_loss(loss: Any) -> None:
    """Raise for what is not one number."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"SALR compares losses: the closure should return one number, but got a tensor of shape "
                f"{tuple(loss.size())} and {loss.dtype}"
            )
    elif isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        raise TypeError(f"SALR compares losses: the closure should return one number, but got {loss!r}")
