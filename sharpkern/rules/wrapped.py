"""Any other optimizer: its own step on the same groups and the same state, after a fused restore."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..memory.layout import Layout
from ..memory.layouts import Layouts
from ..memory.shards import local
from ..memory.state import Names, of_parameters
from .fused import Group, refuse_differentiable


class WrappedRule:
    """A base optimizer that steps by itself."""

    buffers: Names = ()

    def __init__(self, base: type[Optimizer], kwargs: dict[str, Any]) -> None:
        self.base = base
        self.kwargs = kwargs
        self.defaults = base([torch.zeros(1, 1, device="cpu")], **kwargs).defaults
        self.optimizer: Optimizer | None = None
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{base.__name__} cannot be the base optimizer: its step needs a closure to evaluate the model "
                "several times, and a sharpness-aware step hands over one gradient"
            )
        refuse_differentiable(self.defaults)

    def check(self, group: Group) -> None:
        """The wrapped optimizer looks at its options itself; this one it would take."""
        refuse_differentiable(group)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.optimizer is not None:
            # Its groups and state are the outer optimizer's, which copies them itself; the rest is its own.
            inner = object.__new__(type(self.optimizer))
            inner.__dict__.update(self.optimizer.__dict__, state=defaultdict(dict), param_groups=[])
            state["optimizer"] = inner
        return state

    def share(self, outer: Layouts, hidden: Names, loaded: bool = False) -> None:
        """See that the wrapped optimizer has the groups and the state of the outer one, the same objects.

        Args:
            outer: the outer one's layouts.
            hidden: names of state that is not the wrapped optimizer's.
            loaded: whether they hold something else now; an old state dict may want the optimizer's own amendments.
        """
        inner = self.optimizer
        same = inner is not None and inner.param_groups is outer.param_groups and inner.state is outer.state
        if same and not loaded:
            return
        with ExitStack() as stack:
            _hide(stack, outer, hidden)
            if self.optimizer is None:
                self.optimizer = self.base(outer.param_groups, **self.kwargs)
                outer.state.update(self.optimizer.state)  # some make their state at once
            self.optimizer.__setstate__({"state": outer.state, "param_groups": outer.param_groups})

    def step(
        self,
        layouts: Layouts,
        hidden: Names,
        direction: str | None,
        coefficients: Mapping[torch.device, Tensor],
        clip: Mapping[torch.device, Tensor],
        lr_scale: float,
    ) -> None:
        """Its own step, with d = clip (a g + b v) in ``p.grad`` and learning rates scaled meanwhile.

        Args:
            layouts: of the optimizer whose groups and state it shares.
            hidden: names of state that it does not see.
            direction: the flat buffer v, or none.
            coefficients: [a, b] on every device, or nothing: a = 1.
            clip: the factor on every device, or nothing.
            lr_scale: of every group's learning rate.
        """
        with ExitStack() as stack:
            for layout in layouts:
                if layout.device in coefficients:
                    _mix(stack, layout, coefficients[layout.device], direction)
                grads = [local(p.grad) for p in layout.params if p.grad is not None]
                if grads and layout.device in clip:
                    torch._foreach_mul_(grads, clip[layout.device].to(layout.dtype))
            for group in layouts.param_groups if lr_scale != 1.0 else ():
                lent = group["lr"] * lr_scale
                stack.callback(_take_back_lr, group, group["lr"], lent)
                group["lr"] = lent
            _hide(stack, layouts, hidden)
            # Not the hooked step: global hooks fire once a step, around ours.
            step: Any = self.base.step
            getattr(step, "__wrapped__", step)(self.optimizer)


def _mix(stack: ExitStack, layout: Layout, coefficients: Tensor, direction: str | None) -> None:
    """Put a g + b v into ``p.grad`` until the stack closes."""
    a, b = coefficients.to(layout.state_dtype)
    for i, p in enumerate(layout.params):
        grad = p.grad
        if grad is not None:
            stack.callback(setattr, p, "grad", grad)
            here = local(grad)
            mixed = a * here.to(a.dtype)
            if direction in layout.buffers:
                mixed = mixed + b * layout.view(direction, i)
            mixed = mixed.to(grad.dtype)
            p.grad = mixed if layout.shards is None else layout.shards.wrapped(i, mixed)


def _take_back_lr(group: Group, lr: Any, lent: Any) -> None:
    """A wrapped optimizer may have changed the lent learning rate: by the same factor, then."""
    if group["lr"] is lent:
        group["lr"] = lr
    elif lent != 0:
        group["lr"] = group["lr"] * (lr / lent)


def _hide(stack: ExitStack, outer: Layouts, names: Names) -> None:
    """Take state out of ``outer`` until the stack closes.

    Some optimizers make their state when a parameter has none, and look for it when there is any.
    """
    for name in names:
        for p in [p for p, entry in of_parameters(outer.state) if name in entry]:
            stack.callback(_show, outer, p, name, outer.state[p][name])
            del outer.state[p][name]
            if not outer.state[p]:
                del outer.state[p]


def _show(outer: Layouts, p: Tensor, name: str, value: Tensor) -> None:
    outer.state[p][name] = value
