"""SALR: a learning rate that follows the sharpness of the loss."""

from __future__ import annotations

import bisect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..flat import Receiver
from ..policy import check_count
from ..rules import FusedRule, Group
from .optimizer import FIRST, TwoPassOptimizer, _check_number

BRANCH = 2  # the norms of the measuring passes lie behind FIRST and LAST


class SALR(TwoPassOptimizer):
    r"""Sharpness-aware learning rates: a base optimizer that takes large steps in sharp valleys, small ones in flat.

    .. math::
        \theta^\pm_0 = w, \qquad
        \theta^\pm_{i+1} &= \theta^\pm_i \pm \gamma\, \frac{\nabla L_B(\theta^\pm_i)}{\|\nabla L_B(\theta^\pm_i)\|_2} \\
        S &= L_B(\theta^+_{n_\text{ascent}}) - L_B(\theta^-_{n_\text{descent}}) \\
        \eta &= \eta_0\, \frac{S}{\text{median}(S_1, \dots, S)}, \qquad w \leftarrow \text{base}_\eta(w,\ \nabla L_B(w))

    Every so many steps S is measured on the step's own batch; weights, optimizer state and, with ``model=``, norm
    statistics are afterwards what they were, to the bit. The ratio is held until the next measurement; 1 at the start.
    The median is over all measurements, the current one included, and exact. An S that is not positive, or not
    finite, is not recorded and changes nothing. :math:`\eta_0` is the group's ``lr``, which is never written to: a
    scheduler moves it as always. The ratio reaches AdamW's weight decay, too.

    A measurement takes ``n_ascent + n_descent`` forward and backward passes more; the gradient at w is shared by both
    branches and by the training step. Models with dropout draw anew in every pass, which S measures along.

    With ``maximize`` in the first group S is that of the loss with its sign turned.

    It is stepped by a closure only, which returns the loss and is called in every pass: ``first_step`` and
    ``second_step`` raise. S is the only number that the host reads, once a measurement.

    SAM as the base is refused. S is measured at w and scales a step along the gradient at w; SAM steps along another
    one, and already seeks out a small S. Nobody has published the combination, so there is no recursion to be true to.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`; one that has a learning rate ``lr``.
        n_ascent, n_descent: steps of the two branches.
        step_size: :math:`\gamma`, the length of each, in units of the weights.
        every: one step in so many measures, the first one included.
        perturb_eps: added to the norm of a branch's gradient, against division by zero.
        model, max_grad_norm, flatten: as in :class:`sharpkern.SAM`.
        skip_nonfinite: a step that meets an infinite or NaN gradient in a pass whose gradient is followed (all but
            the ends of the branches) changes nothing, the history included, and is counted in
            ``stats["skipped_steps"]``.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, and in a step for a closure that does not return one
            number, before anything changed.

    Source: Yue et al. 2020, `SALR: Sharpness-aware Learning Rate Scheduler for Improved Generalization
    <https://arxiv.org/abs/2011.05348>`_.
    """

    _kept = (*TwoPassOptimizer._kept, "_n_ascent", "_n_descent", "_step_size", "_every", "_norm_rows", "_history",
             "_sharpness", "_lr_scale")  # fmt: skip
    _statistics_shapes = {**TwoPassOptimizer._statistics_shapes, "history": (None,), "sharpness": (), "lr_scale": ()}

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        *,
        n_ascent: int = 5,
        n_descent: int = 5,
        step_size: float = 0.002,
        every: int = 2,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        for name, count in (("n_ascent", n_ascent), ("n_descent", n_descent), ("every", every)):
            check_count(count, name)
        _check_number("step_size", step_size, positive=True)
        self._n_ascent, self._n_descent, self._every = int(n_ascent), int(n_descent), int(every)
        self._step_size = float(step_size)
        self._norm_rows = BRANCH + n_ascent - 1 + n_descent - 1
        self._history: list[float] = []  # every S, in ascending order
        self._sharpness = math.nan
        self._lr_scale = 1.0
        super().__init__(
            params,
            base_optimizer,
            {},
            perturb_eps=perturb_eps,
            model=model,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            base_kwargs=base_kwargs,
        )

    def _reset(self) -> None:
        super()._reset()
        self._receiver = Receiver()

    def _check_options(self, group: Mapping[str, Any]) -> None:
        if not isinstance(self._rule, FusedRule) and group.get("lr", self._rule.defaults.get("lr")) is None:
            raise ValueError(f"{self._rule.base.__name__} has no learning rate lr for SALR to scale")

    def first_step(self, zero_grad: bool = False) -> bool:
        """Not for SALR, which has to evaluate the model itself.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("SALR takes more passes than two: call step(closure)")

    def second_step(self, zero_grad: bool = False) -> None:
        """Not for SALR, see ``first_step``.

        Raises:
            RuntimeError: always.
        """
        self.first_step()

    def _step_closure(self, evaluate: Callable[[], Any]) -> Any:
        self.zero_grad()
        loss = evaluate()
        _check_loss(loss)
        grads: dict[Tensor, Tensor] = {}
        try:
            with torch.no_grad():
                self._ready()
                self._collect()
                self._measure_first()
                skip, sharpness = False, math.nan
                if self._t % self._every == 0 and any(flat.has_gradients for flat in self._flat):
                    grads = self._set_aside()
                    sharpness, finite = self._explore(evaluate, grads)
                    skip = self._skip_nonfinite and not finite
                    self._ready()
                    self._collect()
                self._pending = "plain"
                self._unchanged = self._measured_first = True
                self._t += 1
                self._plain_steps += 1
                if skip:
                    self._counters[2] += 1
                    self._finish()
                else:
                    self._record(sharpness)
                    self._last_pass()
        except BaseException:
            self.restore()
            self._bring_back(grads)
            raise
        return loss

    def _explore(self, evaluate: Callable[[], Any], grads: Mapping[Tensor, Tensor]) -> tuple[float, bool]:
        """(S, whether every gradient on the way was finite). The weights and ``grads`` are back afterwards."""
        self._pending = "perturbed"
        self._freeze()
        ends: list[Any] = []
        used = BRANCH
        for direction, steps in ((-1, self._n_descent), (1, self._n_ascent)):
            if ends:
                self._restore_weights()
                self._bring_back(grads)
                self._ready()
                self._collect()
            row = FIRST
            for i in range(steps):
                if i > 0:
                    self.zero_grad()
                    evaluate()
                    self._ready()
                    self._collect()
                    row, used = used, used + 1
                    for j, flat in enumerate(self._flat):
                        self._measure(flat, self._norms[flat.device][row], j)
                    self._share_norms(row)
                self._move(direction, row, keep=not ends and i == 0)
            self.zero_grad()
            ends.append(evaluate())
        self._put_back()
        self._bring_back(grads)
        norms = self._norms[self._flat[0].device]
        finite = (norms[FIRST].sum() + norms[BRANCH:].sum()).isfinite()
        values = [torch.as_tensor(x).detach().reshape(()).to(norms) for x in (*ends, finite)]
        lowest, highest, seen = self._receiver.read(torch.stack(values)).tolist()
        rise = highest - lowest
        return (-rise if self.param_groups[0].get("maximize") else rise), bool(seen)

    def _move(self, direction: int, row: int, keep: bool) -> None:
        """One step of a branch, along the gradients whose squared norm is in a row; ``keep`` the weights before."""
        length = direction * self._step_size
        radius: list[list[float | Tensor]] = [
            [-length if group.get("maximize") else length, 0.0] for group in self.param_groups
        ]
        for flat in self._flat:
            if keep:
                flat.ascending()
            else:
                flat.keep_others()
            params, grads = flat.lists
            torch.ops.sharpkern.ascend.default(
                params,
                flat.buffer("backup") if keep else flat.empty,
                flat.empty,
                self._counters[:0],
                grads,
                flat.rows,
                flat.blocks,
                self._group_table("ascent" if direction > 0 else "descent", radius, flat.device),
                self._norms[flat.device][row : row + 1],
                eps=self._perturb_eps,
                skip_nonfinite=self._skip_nonfinite,
                dtype=flat.dtype,
            )
            if keep:
                flat.ascended()
            else:
                flat.written()
        # An autocast region around the closure keeps low-precision copies of the weights.
        torch.clear_autocast_cache()

    def _set_aside(self) -> dict[Tensor, Tensor]:
        """The gradients at w. Copies: a closure may have its gradients written to the same memory in every pass."""
        grads = {p: p.grad for flat in self._flat for p in flat.params if p.grad is not None}
        copies = [torch.empty_like(grad) for grad in grads.values()]
        torch._foreach_copy_(copies, list(grads.values()))
        return dict(zip(grads, copies, strict=True))

    def _bring_back(self, grads: Mapping[Tensor, Tensor]) -> None:
        if not grads:
            return
        self.zero_grad()
        for p, grad in grads.items():
            if self._flatten and p.grad is not None:
                p.grad.copy_(grad)
            else:
                p.grad = grad

    def _record(self, sharpness: float) -> None:
        if math.isfinite(sharpness) and sharpness > 0:
            bisect.insort(self._history, sharpness)
            self._sharpness = sharpness
            # The mean of the middle two, or twice the middle one.
            last = len(self._history) - 1
            self._lr_scale = sharpness / ((self._history[last // 2] + self._history[(last + 1) // 2]) / 2)

    def _effective_lr(self, group: Group) -> Any:
        return group["lr"] if self._lr_scale == 1.0 else group["lr"] * self._lr_scale

    def _own_statistics(self) -> dict[str, Any]:
        return {
            **super()._own_statistics(),
            "history": torch.tensor(self._history, dtype=torch.float64, device="cpu"),
            "sharpness": torch.tensor(self._sharpness, dtype=torch.float64, device="cpu"),
            "lr_scale": torch.tensor(self._lr_scale, dtype=torch.float64, device="cpu"),
        }

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        super()._check_loaded(state_dict)
        keys = {"history", "sharpness", "lr_scale"}
        found = keys & (state_dict.get("sharpkern") or {}).keys()
        if found and found != keys:
            self._loading = None
            raise ValueError(f"loaded state dict has {sorted(found)} of SALR's {sorted(keys)} only")

    def _load_statistics(self, own: Mapping[str, Any]) -> None:
        super()._load_statistics(own)
        if "history" in own:
            self._history = own["history"].tolist()
            self._sharpness = float(own["sharpness"])
            self._lr_scale = float(own["lr_scale"])

    @property
    def stats(self) -> dict[str, Tensor]:
        """As in :class:`sharpkern.SAM`, without second passes, and of the last measurement that was recorded:
        ``sharpness``, S (NaN before), and ``lr_scale``, S over the median (1 before)."""
        stats = super().stats
        like = stats["grad_norm"]
        return {
            **stats,
            "sharpness": torch.full((), self._sharpness, dtype=like.dtype, device=like.device),
            "lr_scale": torch.full((), self._lr_scale, dtype=like.dtype, device=like.device),
        }


def _check_loss(loss: Any) -> None:
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(
                f"SALR compares losses: the closure should return one number, but got a tensor of shape "
                f"{tuple(loss.size())} and {loss.dtype}"
            )
    elif isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        raise TypeError(f"SALR compares losses: the closure should return one number, but got {loss!r}")
