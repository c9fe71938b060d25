"""How to move: the base rule that turns the last gradient of a step into new weights.

``torch.optim.SGD``, ``Adam`` and ``AdamW`` (exactly these) become fused rules: one launch that steps from the
backup, so that undoing the perturbation costs nothing. Any other optimizer class is wrapped: a fused restore,
then its own ``step``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .flat import FlatBuffers
from .ops import schema

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Any]]

# They choose between torch's implementations of one algorithm; there is one implementation here.
_WITHOUT_MEANING = ("foreach", "fused", "capturable")


class FusedRule(ABC):
    """A base rule that runs as one op a layout."""

    # Flat buffers in the order of the op's arguments, then the group values in the order of its columns.
    buffers: tuple[str, ...]
    columns: tuple[str, ...]

    def __init__(self, base: type[Optimizer], kwargs: dict[str, Any]) -> None:
        self.base = base
        ignored = {key: kwargs[key] for key in _WITHOUT_MEANING if key in kwargs}
        self.defaults = self._probe({key: value for key, value in kwargs.items() if key not in ignored}) | ignored

    def _probe(self, options: dict[str, Any]) -> dict[str, Any]:
        """torch's own defaults for these options, and torch's own error where one is wrong."""
        _refuse_differentiable(options)
        return self.base([torch.zeros(1, 1, device="cpu")], **options).defaults

    def check(self, group: Group) -> None:
        """Raise torch's error for options of a group that torch would not take."""
        known = inspect.signature(self.base.__init__).parameters
        self._probe({k: v for k, v in group.items() if k in known and k != "params" and k not in _WITHOUT_MEANING})

    def values(self, group: Group) -> list[float | Tensor]:
        """The group's row of the table of values; a tensor stands for itself where reading it would wait."""
        return [number(group[column]) for column in self.columns]

    @abstractmethod
    def state_names(self, group: Group) -> tuple[str, ...]:
        """Names that a parameter of this group has in ``opt.state``, torch's names."""

    @abstractmethod
    def step(self, flat: FlatBuffers, *args: Any, **kwargs: Any) -> None:
        """Launch the rule's op on one layout."""

    def expose(self, flat: FlatBuffers, state: State, groups: Sequence[Group]) -> None:
        """Put the state of parameters that step for the first time into ``opt.state``, as views."""
        names = [self.state_names(group) for group in groups]
        if flat.exposed_groups == names:
            return
        for name in {name for group in names for name in group} - {"step"}:
            flat.buffer(name)
        for i, p in enumerate(flat.params):
            expected = names[flat.groups[i]]
            if flat.exposed[i] != expected and flat.table[i, schema.GRAD] != 0:
                entry = state[p]
                for name in expected:
                    entry[name] = flat.step[i] if name == "step" else flat.view(name, i)
                flat.exposed[i] = expected
        if flat.exposed == [names[g] for g in flat.groups]:
            flat.exposed_groups = names

    def attach(self, flat: FlatBuffers, state: State, groups: Sequence[Group]) -> None:
        """Take loaded or foreign state tensors into the flat buffers and leave views in their place.

        Raises:
            RuntimeError: for state of another shape than its parameter; nothing was taken then.
        """
        for p, label in zip(flat.params, flat.names, strict=True):
            for name in self.buffers:
                value = state.get(p, {}).get(name)
                if value is not None and value.size() != p.size():
                    raise RuntimeError(
                        f"{label} has shape {tuple(p.size())} now, its state {name} shape {tuple(value.size())}"
                    )
        for i, p in enumerate(flat.params):
            entry = state.get(p)
            if not entry:
                continue
            found: list[str] = []
            for name in self.buffers:
                value = entry.get(name)
                if value is not None:
                    view = flat.view(name, i)
                    entry[name] = view.copy_(value)
                    found.append(name)
            if "step" in entry or found:
                # A momentum buffer without a counter comes from torch.optim.SGD: it has been stepped.
                flat.step[i].copy_(torch.as_tensor(entry.get("step", 1.0)))
                entry["step"] = flat.step[i]
            if set(self.state_names(groups[flat.groups[i]])) <= entry.keys():
                flat.exposed[i] = self.state_names(groups[flat.groups[i]])

    def _state(self, flat: FlatBuffers) -> list[Tensor]:
        return [flat.buffers.get(name, flat.empty) for name in self.buffers]


class SGDRule(FusedRule):
    """torch.optim.SGD: momentum, dampening, nesterov, weight decay, maximize."""

    buffers = ("momentum_buffer",)
    columns = schema.SGD

    def state_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer", "step") if _nonzero(group["momentum"]) else ()

    def step(self, flat: FlatBuffers, *args: Any, **kwargs: Any) -> None:
        params, grads = flat.lists
        counters, *rest = args
        torch.ops.sharpkern.sgd.default(params, *self._state(flat), flat.step, counters, grads, *rest, **kwargs)


class AdamRule(FusedRule):
    """torch.optim.Adam and AdamW, which differ in how a group decays its weights."""

    buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    columns = schema.ADAM

    def state_names(self, group: Group) -> tuple[str, ...]:
        return ("step", "exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def values(self, group: Group) -> list[float | Tensor]:
        betas = dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        # A group loaded from a torch that did not know the key yet decays as its class does.
        decoupled = {"decoupled_weight_decay": self.base is torch.optim.AdamW}
        return super().values(decoupled | group | betas)

    def step(self, flat: FlatBuffers, *args: Any, **kwargs: Any) -> None:
        params, grads = flat.lists
        counters, *rest = args
        torch.ops.sharpkern.adam.default(params, *self._state(flat), flat.step, counters, grads, *rest, **kwargs)


class WrappedRule:
    """Any other optimizer: its own step on the same groups and the same state, after a fused restore."""

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
        _refuse_differentiable(self.defaults)

    def check(self, group: Group) -> None:
        """The wrapped optimizer looks at its options itself; this one it would take."""
        _refuse_differentiable(group)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.optimizer is not None:
            # Its groups and state are the outer optimizer's, which copies them itself; the rest is its own.
            inner = object.__new__(type(self.optimizer))
            inner.__dict__.update(self.optimizer.__dict__, state=defaultdict(dict), param_groups=[])
            state["optimizer"] = inner
        return state

    def shares(self, outer: Optimizer) -> bool:
        """Whether the wrapped optimizer sees ``outer``'s groups and state: the same objects."""
        inner = self.optimizer
        return inner is not None and inner.param_groups is outer.param_groups and inner.state is outer.state

    def share(self, outer: Optimizer) -> None:
        """Make it see them."""
        if self.optimizer is None:
            self.optimizer = self.base(outer.param_groups, **self.kwargs)
            outer.state.update(self.optimizer.state)  # some make their state at once
        shared = {"state": outer.state, "param_groups": outer.param_groups}
        if not self.shares(outer):
            self.optimizer.__setstate__(shared)

    def step(self) -> None:
        # Not the hooked step: global hooks fire once a step, around ours.
        assert self.optimizer is not None
        step = type(self.optimizer).step
        getattr(step, "__wrapped__", step)(self.optimizer)


Rule = FusedRule | WrappedRule

_FUSED: dict[type[Optimizer], type[FusedRule]] = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamRule,
}


def make_rule(base_optimizer: Any, kwargs: dict[str, Any], own: Sequence[str], owner: str) -> Rule:
    """The rule for a base optimizer class.

    Raises:
        TypeError: when ``base_optimizer`` is no optimizer class, or does not know a keyword.
        ValueError: when it has an option that is called like one of ours (``own``), needs a closure, or
            does not take a value.
    """
    if isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer should be an optimizer class, such as torch.optim.SGD, but got an instance of "
            f"{type(base_optimizer).__name__}; pass the class and its options by keyword"
        )
    if not (inspect.isclass(base_optimizer) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(
            f"base_optimizer should be an optimizer class, such as torch.optim.SGD, but got {base_optimizer!r}"
        )
    if hasattr(base_optimizer, "second_step"):
        raise ValueError(f"{base_optimizer.__name__} cannot be the base optimizer: it takes two passes itself")
    rule = _FUSED.get(base_optimizer, WrappedRule)(base_optimizer, kwargs)
    known = {*inspect.signature(base_optimizer.__init__).parameters, *rule.defaults}
    for key in own:
        if key in known:
            raise ValueError(
                f"{base_optimizer.__name__} has an option {key!r} of its own, which collides with {owner}'s {key!r}; "
                f"it cannot be the base optimizer of {owner}"
            )
    return rule


def _refuse_differentiable(options: Mapping[str, Any]) -> None:
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
