"""torch.optim.SGD, Adam and AdamW as one op a layout."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..memory.state import LayoutState, Names
from ..ops import schema

Group = dict[str, Any]

# They choose between torch's implementations of one algorithm; there is one implementation here.
_WITHOUT_MEANING = ("foreach", "fused", "capturable")


class FusedRule(ABC):
    """A base rule that runs as one op a layout."""

    op: Callable[..., None]
    # Flat buffers in the order of the op's arguments, then the group values in the order of its columns.
    buffers: Names
    columns: Names
    # Of the buffers those without which a parameter has taken no step.
    required: Names = ()

    def __init__(self, base: type[Optimizer], kwargs: dict[str, Any]) -> None:
        self.base = base
        ignored = {key: kwargs[key] for key in _WITHOUT_MEANING if key in kwargs}
        self.defaults = self._probe({key: value for key, value in kwargs.items() if key not in ignored}) | ignored

    def _probe(self, options: dict[str, Any]) -> dict[str, Any]:
        """torch's own defaults for these options, and torch's own error where one is wrong."""
        refuse_differentiable(options)
        return self.base([torch.zeros(1, 1, device="cpu")], **options).defaults

    def check(self, group: Group) -> None:
        """Raise torch's error for options of a group that torch would not take."""
        known = inspect.signature(self.base.__init__).parameters
        self._probe({k: v for k, v in group.items() if k in known and k != "params" and k not in _WITHOUT_MEANING})

    def amend(self, group: Group) -> None:  # noqa: B027
        """What torch's class makes of a loaded group."""

    def values(self, group: Group) -> list[float | Tensor]:
        """The group's row of the table of values; a tensor stands for itself where reading it would wait."""
        return [number(group[column]) for column in self.columns]

    @abstractmethod
    def state_names(self, group: Group) -> Names:
        """Names that a parameter of this group has in ``opt.state``, torch's names."""

    def step(
        self,
        state: LayoutState,
        counters: Tensor,
        backup: Tensor,
        direction: Tensor,
        values: Tensor,
        sq: Tensor,
        coefficients: Tensor,
        max_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        """Launch the rule's op on one layout: the arguments are those of its schema."""
        layout = state.layout
        params, grads, table, blocks = layout.walk
        buffers = [layout.buffers.get(name, layout.empty) for name in self.buffers]
        type(self).op(
            params, *buffers, state.step, counters, grads, backup, direction, table, blocks, values, sq, coefficients,
            max_norm=max_norm, skip_nonfinite=skip_nonfinite, dtype=layout.dtype,
        )  # fmt: skip


class SGDRule(FusedRule):
    """torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

    op = torch.ops.sharpkern.sgd.default
    buffers = ("momentum_buffer",)
    columns = schema.SGD

    def state_names(self, group: Group) -> Names:
        return ("momentum_buffer", "step") if _nonzero(group["momentum"]) else ()


class AdamRule(FusedRule):
    """torch.optim.Adam and AdamW, which differ in how a group decays its weights."""

    op = torch.ops.sharpkern.adam.default
    buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    required = ("exp_avg", "exp_avg_sq")
    columns = schema.ADAM

    def state_names(self, group: Group) -> Names:
        return ("step", "exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def amend(self, group: Group) -> None:
        if self.base is torch.optim.AdamW:  # one of an Adam says otherwise
            group["decoupled_weight_decay"] = True

    def values(self, group: Group) -> list[float | Tensor]:
        betas = dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        # A group loaded from a torch that did not know the key yet decays as its class does.
        decoupled = {"decoupled_weight_decay": self.base is torch.optim.AdamW}
        return super().values(decoupled | group | betas)


FUSED: dict[type[Optimizer], type[FusedRule]] = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamRule,
}


def refuse_differentiable(options: Mapping[str, Any]) -> None:
    """Raise ValueError for ``differentiable=True``."""
    if options.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the step writes weights in place")


def number(value: Any) -> float | Tensor:
    """A float, or the tensor itself when it is on a device that reading would wait for."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value
    return float(value)


def _nonzero(value: Any) -> bool:
    # A tensor on a device counts as nonzero: its value is not read here.
    got = number(value)
    return isinstance(got, Tensor) or got != 0
