"""ASAM: adaptive sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..rules import Group
from .optimizer import TwoPassOptimizer, _check_number
from .sam import SAM


class ASAM(SAM):
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
        perturb_eps, model, max_grad_norm, skip_nonfinite, flatten: as in :class:`sharpkern.SAM`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Kwon et al. 2021, `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
    Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.5,
        eta: float = 0.01,
        *,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho, "eta": eta},
            perturb_eps=perturb_eps,
            model=model,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            base_kwargs=base_kwargs,
        )

    def _check_options(self, group: Mapping[str, Any]) -> None:
        _check_number("rho", group["rho"])
        _check_number("eta", group["eta"])

    def _is_scaled(self, group: Group, name: str | None, param: Tensor) -> bool:
        return "weight" in name if name is not None else param.dim() >= 2

    def _scaled_key(self) -> tuple[Any, ...]:
        return tuple(tuple(group.get("param_names", ())) for group in self.param_groups)

    def _eta(self, group: Group) -> float:
        return float(group["eta"])
