"""SAM: sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..flat import FlatBuffers
from ..rules import Group
from .optimizer import TwoPassOptimizer, _check_number


class SAM(TwoPassOptimizer):
    r"""Sharpness-aware minimization: step with the gradient at the worst point of a small ball.

    .. math::
        e = \rho \, \frac{g}{\|g\|_2 + \epsilon}, \qquad
        w \leftarrow \text{base}\bigl(w,\ \nabla L_B(w + e)\bigr), \qquad g = \nabla L_B(w)

    The norm is over all parameters of all groups together; each group has its own :math:`\rho`. Both
    gradients are of the same batch. Weight decay belongs to the base rule. With ``maximize`` the
    perturbation follows :math:`-g`.

    ``adaptive=True`` scales every tensor by its own magnitude, :math:`e = \rho\, w^2 g / \| |w| g \|` (no
    eta; rho is about 2 then). The authors' ASAM is :class:`sharpkern.ASAM`.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class. Exactly ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are fused; any
            other class is wrapped and its own ``step`` called after a fused restore.
        rho: radius of the ball, in units of the weights; a group may have its own.
        adaptive: elementwise scaling, see above; a group may have its own.
        perturb_eps: :math:`\epsilon`, against division by zero.
        model: when given, running statistics of its norm layers are updated in the first pass only.
        max_grad_norm: clip the second gradient to this norm.
        skip_nonfinite: a step that meets an infinite or NaN gradient in any pass changes nothing and is
            counted in ``stats["skipped_steps"]``. Costs a read of the second gradient.
        flatten: move parameters and gradients into flat buffers; undone by ``unflatten()``.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Example::

        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        loss = opt.step(closure)  # closure: forward, backward, return the loss

    Source: Foret et al. 2021, `Sharpness-Aware Minimization for Efficiently Improving Generalization
    <https://arxiv.org/abs/2010.01412>`_.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive},
            perturb_eps=perturb_eps,
            model=model,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            base_kwargs=base_kwargs,
        )

    def _check_options(self, group: Mapping[str, Any]) -> None:
        _check_number("rho", group["rho"])
        if not isinstance(group.get("adaptive", False), bool):
            raise TypeError(f"adaptive should be a bool, but got {group['adaptive']!r}")

    def _is_scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        # A loaded group may have the key where the class does not have the option.
        return "adaptive" in self.defaults and bool(group["adaptive"])

    def _scaled_key(self) -> tuple[Any, ...]:
        return tuple("adaptive" in self.defaults and group["adaptive"] for group in self.param_groups)

    def _eta(self, group: Group) -> float:
        """T_w = abs(w) + eta on scaled tensors."""
        return 0.0

    def _radius(self, device: torch.device) -> Tensor:
        rows: list[list[float | Tensor]] = [
            [-group["rho"] if group.get("maximize") else group["rho"], self._eta(group)] for group in self.param_groups
        ]
        return self._group_table("radius", rows, device)

    def _measure(self, flat: FlatBuffers, sq: Tensor, buffer: int) -> None:
        if not flat.any_scaled:
            super()._measure(flat, sq, buffer)
            return
        params, grads = flat.lists
        torch.ops.sharpkern.norm_scaled.default(
            sq,
            flat.partials,
            flat.empty,
            params,
            grads,
            flat.rows,
            flat.blocks,
            self._radius(flat.device),
            buffer=buffer,
            decay=0.0,
            coefficient=0.0,
            dtype=flat.dtype,
        )

    def _perturb(self, flat: FlatBuffers, sq: Tensor, counters: Tensor) -> None:
        params, grads = flat.lists
        rest = (counters, grads, flat.rows, flat.blocks, self._radius(flat.device), sq)
        options = {"eps": self._perturb_eps, "skip_nonfinite": self._skip_nonfinite, "dtype": flat.dtype}
        backup = flat.buffer("backup")
        if flat.any_scaled:
            torch.ops.sharpkern.ascend_scaled.default(params, backup, *rest, **options)
        else:
            torch.ops.sharpkern.ascend.default(params, backup, self._kept_gradient(flat), *rest, **options)

    def _kept_gradient(self, flat: FlatBuffers) -> Tensor:
        """The buffer that keeps the gradient for after the second pass, or none."""
        return flat.empty
