"""Gradients of losses that a ``torch.amp.GradScaler`` scaled, for the steps that are told of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from ..checks import type_name
from ..memory.layouts import Group, Layouts
from ..memory.shards import local
from .msharpness import MSharpness

UNSCALED = (
    "step(scaler=scaler) unscales the gradients: scaler.unscale_ is not to be called as well. max_grad_norm= clips them"
)


class _Pass:
    """What a scaler takes for one more optimizer: it unscales each once an update, and notes what overflowed there."""

    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts

    @property
    def param_groups(self) -> list[Group]:
        return self._layouts.param_groups


class Unscaler:
    """Of the steps of one optimizer.

    Args:
        layouts: its parameters.
        key: its id, by which a scaler knows it.
        apart: whose first gradients may be this process's own.
    """

    def __init__(self, layouts: Layouts, key: int, apart: MSharpness | None = None) -> None:
        self._layouts, self._key, self._ids, self._apart = layouts, key, {key}, apart
        self._passes: list[_Pass] = []  # they stay: a scaler knows them by their id
        # Where a scaler notes what it did since its last update: as it was when gradients were unscaled.
        self._used: Any = None
        self._early = False  # whether the user unscaled the gradients of the first pass
        self._as_is = False  # whether a step by hand goes on with them
        self.scaler: GradScaler | None = None  # of the step that is open, where it is told
        # A trainer's, for its hooks: called once, when the first gradients of a step are unscaled.
        self.after_first: Callable[[], None] | None = None

    def begin(self, scaler: Any, skips: bool, wrapper: Any = None) -> None:
        """Take the scaler of a step; one that is not enabled is none.

        Args:
            skips: whether the step is skipped after an overflow.
            wrapper: of the optimizer: a scaler knows it by another id.

        Raises:
            TypeError: for what is no gradient scaler.
            RuntimeError: where nothing would be skipped, and for a second step before an update.
        """
        self.end()
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler should be a torch.amp.GradScaler, but got {type_name(scaler)}")
        if scaler is None or not scaler.is_enabled():
            return
        if not skips:
            raise RuntimeError(
                "a gradient scaler goes with steps that are skipped after an overflow: skip_nonfinite=True"
            )
        if scaler._per_optimizer_states is self._used:
            raise RuntimeError("scaler.update() is due between two steps, also where the first one was cancelled")
        self.scaler = scaler
        self._ids = {self._key} if wrapper is None else {self._key, id(wrapper)}
        self._early, self._as_is = self._is_unscaled(scaler), False
        if self._early:
            self._used = scaler._per_optimizer_states

    def refuse_unscaled(self) -> None:
        """Raise where the user unscaled the gradients of a step that unscales those of every pass."""
        if self.scaler is not None and self._early:
            raise RuntimeError(UNSCALED)

    def end(self) -> None:
        """No step is open."""
        self.scaler = None

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss, to call backward on."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscaling(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that unscales what it leaves."""
        scaler, calls = self.scaler, itertools.count()
        if scaler is None:
            return closure

        def unscaled() -> Any:
            result = closure()
            if self._is_unscaled(scaler):
                raise RuntimeError(UNSCALED)
            self._unscale(scaler, next(calls))
            return result

        return unscaled

    def measuring(self, measure: Callable[[], bool]) -> bool:
        """The first pass by hand, of unscaled gradients: ``measure()``, whether another gradient is wanted. Where none
        is, they get their scale back: what follows is the same either way."""
        scaler = self.scaler
        if scaler is None:
            return measure()
        if not self._early:
            self._unscale(scaler, 0)
        else:
            for key in self._ids & scaler._per_optimizer_states.keys():
                self._agree(scaler, key)
        again = measure()
        if not again and not self._early:
            params = (p for group in self._layouts.param_groups for p in group["params"])
            grads = [local(p.grad) for p in params if p.grad is not None]
            for device in {grad.device for grad in grads}:
                there = [grad for grad in grads if grad.device == device]
                torch._foreach_mul_(there, scaler.scale(torch.ones((), device=device)))
        self._as_is = not again
        return again

    def unscale_last(self) -> None:
        """Unscale the gradients that a step by hand ends with, where neither the user nor the scaler's step did."""
        scaler = self.scaler
        if scaler is None or (self._early and self._as_is):
            return
        if self._early or not self._is_unscaled(scaler):
            self._unscale(scaler, 1)
        self._used = scaler._per_optimizer_states

    def _unscale(self, scaler: GradScaler, i: int) -> None:
        """In place, the gradients of pass i. The scaler notes an overflow for its next update."""
        while len(self._passes) <= i:
            self._passes.append(_Pass(self._layouts))
        scaler.unscale_(self._passes[i])  # type: ignore[arg-type]
        if i == 0:
            self._agree(scaler, id(self._passes[i]))
        self._used = scaler._per_optimizer_states
        if self.after_first is not None:
            after_first, self.after_first = self.after_first, None
            after_first()

    def _agree(self, scaler: GradScaler, key: int) -> None:
        """Where gradients are each process's own, all note the overflow of one: they lower the scale together."""
        device = next((p.device for group in self._layouts.param_groups for p in group["params"]), None)
        if self._apart is None or not self._apart.local or device is None:
            return
        found = scaler._per_optimizer_states[key]["found_inf_per_device"]
        flags = [torch.zeros((), device=device), *(flag.reshape(()).to(device) for flag in found.values())]
        flag = torch.stack(flags).max()  # one number, whatever this process has met
        flag = self._apart.any(flag)
        for each in found.values():
            each.copy_(flag)
        found.setdefault(device, flag.reshape(1))

    def _is_unscaled(self, scaler: GradScaler) -> bool:
        """Whether somebody unscaled the optimizer's gradients since the last update."""
        known = scaler._per_optimizer_states
        return any(known[key]["stage"] is OptState.UNSCALED for key in self._ids if key in known)
