"""LookSAM: the second gradient of one step, used again in the next ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..flat import FlatBuffers
from ..policy import Every
from .optimizer import FIRST, LAST, TwoPassOptimizer, _check_number
from .sam import SAM

# Rows of the norms' matrix behind FIRST and LAST: <g, g_s>, and ||g_v||^2.
DOT, G_V = 2, 3


class LookSAM(SAM):
    r"""SAM every k steps; in between the part of its gradient that pointed elsewhere is added to the plain gradient.

    .. math::
        g &= \nabla L_B(w) \\
        t \bmod k = 0:\quad g_s &= \nabla L_B(w + \rho\, g / (\|g\|_2 + \epsilon)), \qquad
        g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|_2^2}\, g, \qquad w \leftarrow \text{base}(w,\ g_s) \\
        \text{else:}\quad w &\leftarrow \text{base}\Bigl(w,\ g + \alpha \frac{\|g\|_2}{\|g_v\|_2}\, g_v\Bigr)

    One scalar product over all parameters of all groups together, as in the paper; not one a tensor. A zero gradient
    leaves :math:`g_v` as it was; a :math:`g_v` of norm 1e-12 or less is not added.

    A refresh takes two forward and backward passes and five launches, a step in between one and two; ``first_step``
    returns False for it.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`. A wrapped one finds the mixed gradient in
            ``p.grad`` during its step.
        rho: radius of the ball; a group may have its own.
        k: one step in k is a SAM step, the first one included. With k = 1 this is :class:`sharpkern.SAM`.
        alpha: how much of :math:`g_v`, in norms of g. 0.7 was tuned for vision transformers; take 0.1 to 0.3 for
            convolutional networks with SGD.
        perturb_eps, model, skip_nonfinite, flatten: as in :class:`sharpkern.SAM`.
        max_grad_norm: clip the gradient of the last pass to this norm, before :math:`g_v` is added.
        **base_kwargs: options of the base optimizer.

    State: ``opt.state[p]["g_v"]``, float32 (float64 for float64 parameters), parameter-shaped.

    Raises:
        ValueError, TypeError: for arguments out of range, before anything changed.

    Source: Liu et al. 2022, `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_.
    """

    _norm_rows = 4
    _own_state = ("g_v",)
    _kept_tensors = (*SAM._kept_tensors, "_g_v_sq")
    _kept = (*SAM._kept, "_alpha", "_g_v_count")
    _statistics_shapes = {**SAM._statistics_shapes, "g_v_squared_norm": ()}

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        k: int = 5,
        alpha: float = 0.7,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self._reuse(alpha)
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho},
            policy=Every(k),
            perturb_eps=perturb_eps,
            model=model,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            flatten=flatten,
            base_kwargs=base_kwargs,
        )

    def _reuse(self, alpha: float) -> None:
        """To be called before ``__init__``: arguments are checked before anything changed."""
        _check_number("alpha", alpha)
        self._alpha = float(alpha)
        self._g_v_sq = torch.zeros((), dtype=torch.float64, device="cpu")
        self._g_v_count = 0  # parameters that have one

    def _kept_gradient(self, flat: FlatBuffers) -> Tensor:
        return flat.buffer("gradient")

    def _measure_last(self) -> int:
        if not self.is_perturbed:
            return super()._measure_last()
        for i, flat in enumerate(self._flat):
            torch.ops.sharpkern.dots.default(
                self._norms[flat.device][LAST : DOT + 1, i],
                flat.partials,
                flat.buffer("gradient"),
                flat.lists[1],
                flat.rows,
                flat.blocks,
                dtype=flat.dtype,
            )
        for row in (LAST, DOT):
            self._share_norms(row)
        for i, flat in enumerate(self._flat):
            norms = self._norms[flat.device]
            torch.ops.sharpkern.project.default(
                flat.buffer("g_v"),
                norms[G_V, i],
                flat.partials,
                flat.buffer("gradient"),
                flat.lists[1],
                flat.rows,
                flat.blocks,
                norms[FIRST : DOT + 1],
                dtype=flat.dtype,
            )
        self._share_norms(G_V)
        self._expose()
        return LAST

    def _expose(self) -> None:
        """Put g_v into ``opt.state`` as views, where there may be one for the first time."""
        for flat in self._flat:
            if not all(flat.own_exposed):
                for i, touched in enumerate(flat.touched()):
                    if touched and not flat.own_exposed[i]:
                        self.state[flat.params[i]]["g_v"] = flat.view("g_v", i)
                        flat.own_exposed[i] = True
        for p in self._idle:  # left out of the projection: theirs is gone
            if "g_v" in self.state.get(p, {}):
                del self.state[p]["g_v"]
        self._g_v_count = sum(sum(flat.own_exposed) for flat in self._flat)

    def _mixed(self, flat: FlatBuffers) -> tuple[Tensor, Tensor, float]:
        if self._pending != "plain" or "g_v" not in flat.buffers:
            return super()._mixed(flat)
        return flat.buffers["g_v"], self._norms[flat.device][G_V : G_V + 1], self._alpha

    # State.

    def _take_state(self) -> None:
        for flat in self._flat:
            for p, label in zip(flat.params, flat.names, strict=True):
                value = self.state.get(p, {}).get("g_v")
                if value is not None and value.size() != p.size():
                    raise RuntimeError(
                        f"{label} has shape {tuple(p.size())} now, its state g_v shape {tuple(value.size())}"
                    )
        super()._take_state()
        taken = []
        for flat in self._flat:
            for i, p in enumerate(flat.params):
                entry = self.state.get(p, {})
                if "g_v" in entry:
                    entry["g_v"] = flat.view("g_v", i).copy_(entry["g_v"])
                    flat.own_exposed[i] = True
                    taken.append(entry["g_v"])
        # The stored norm has the bits of the run that it is of; it is not that of a part of g_v, or of another one.
        if len(taken) != self._g_v_count:
            self._g_v_sq = torch.zeros((), dtype=torch.float64, device="cpu")
            for g_v in taken:
                self._g_v_sq += g_v.double().square().sum().cpu()
        self._g_v_count = len(taken)
        for norms in self._norms.values():
            norms[G_V, 0] = self._g_v_sq  # in the first layout's place: only their sum is looked at

    def _keep_statistics(self) -> None:
        super()._keep_statistics()
        self._g_v_sq = self._sum_over_layouts(G_V, self._g_v_sq)

    def _own_statistics(self) -> dict[str, Any]:
        return {
            **super()._own_statistics(),
            "g_v_squared_norm": self._g_v_sq.clone(),
            "g_v_count": self._g_v_count,
        }

    def _load_statistics(self, own: Mapping[str, Any]) -> None:
        super()._load_statistics(own)
        self._g_v_count = -1  # of none: the norm is taken anew
        if {"g_v_squared_norm", "g_v_count"} <= own.keys():
            self._g_v_sq = own["g_v_squared_norm"].clone()
            self._g_v_count = int(own["g_v_count"])
