"""AE-SAM's trigger, for the optimizers that have it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..flat import Receiver
from ..ops.schema import EMA
from ..policy import Adaptive, Statistics
from .optimizer import FIRST, TwoPassOptimizer


class AdaptivePolicy(TwoPassOptimizer):
    """Takes the second pass when the squared gradient norm is large: :class:`sharpkern.policy.Adaptive`.

    The launch that finishes the norm updates the statistics on the device; the decision is all that the host reads.
    """

    _kept_tensors = (*TwoPassOptimizer._kept_tensors, "_ema")
    _kept = (*TwoPassOptimizer._kept, "_adaptive", "_warned")
    _statistics_shapes = {**TwoPassOptimizer._statistics_shapes, "ema": (len(EMA),)}

    def _adapt(self, total_steps: int, lambda_start: float, lambda_end: float, decay: float) -> None:
        """To be called before ``__init__``: arguments are checked before anything changed."""
        self._adaptive = Adaptive(total_steps, lambda_start, lambda_end, decay)
        self._ema = torch.tensor([*Statistics(), 0.0], dtype=torch.float64, device="cpu")
        self._warned = False

    def _reset(self) -> None:
        super()._reset()
        self._receiver = Receiver()

    def _decide(self) -> bool:
        if not any(flat.has_gradients for flat in self._flat):
            return False
        if self._t >= self._adaptive.total_steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} was told of total_steps={self._adaptive.total_steps} and takes more: the "
                "threshold stays where it was to end",
                UserWarning,
                stacklevel=2,
            )
        # The last launch needs the other norms, and is that of the layout that the statistics lie with.
        home, *others = self._flat
        for i, flat in enumerate(others, 1):
            self._measure(flat, self._norms[flat.device][FIRST], i)
        self._share_norms(FIRST)
        torch.ops.sharpkern.norm.default(
            self._norms[home.device][FIRST],
            home.partials,
            self._ema,
            home.lists[1],
            home.rows,
            home.blocks,
            buffer=0,
            decay=self._adaptive.decay,
            coefficient=self._adaptive.coefficient(self._t),
            dtype=home.dtype,
        )
        self._share_norms(FIRST)
        self._measured_first = True
        return bool(self._receiver.read(self._ema[3:]))

    def _take_state(self) -> None:
        super()._take_state()
        if self._flat:
            home = self._flat[0].device
            self._ema = self._ema.to(home, self._norms[home].dtype)

    def _own_statistics(self) -> dict[str, Any]:
        return {**super()._own_statistics(), "ema": self._ema.clone()}

    def _load_statistics(self, own: Mapping[str, Any]) -> None:
        super()._load_statistics(own)
        if "ema" in own:
            self._ema = own["ema"].clone()

    @property
    def stats(self) -> dict[str, Tensor]:
        """As in :class:`sharpkern.SAM`, and of the squared gradient norm: ``ema_mean``, ``ema_var`` and ``threshold``,
        what it was compared with last (NaN before)."""
        mean, var, threshold, _ = self._ema.clone().unbind()
        return {**super().stats, "ema_mean": mean, "ema_var": var, "threshold": threshold}
