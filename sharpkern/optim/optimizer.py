"""What every algorithm is: an optimizer with the shared arguments, which are spelled here once.

An algorithm is a subclass with ``passes``, a generator that says what happens between the passes in the order of its
paper: verbs of the step (``measure.py``, ``step.py``), and a yield where it needs the caller (``driver.py``).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number, check_params, type_name, warn, warn_half
from ..direction import Direction, Predicate
from ..distributed import refuse_within_zero
from ..memory.layouts import check_aliases, entries
from ..ops import schema
from ..policy import Adaptive, Always, Policy, Scheduled, choose
from ..rules import FusedRule, make_rule
from .checkpoint import NUMBERS
from .driver import Driver
from .measure import Settings
from .step import Step


class SharpnessAwareOptimizer(Driver):
    """Base class of the optimizers that may look at the gradient more than once a step.

    Args:
        params, base_optimizer: as in :class:`sharpkern.SAM`, with the keyword arguments that all classes share.
        own: this algorithm's group options and their defaults.
    """

    # What an algorithm declares: where it goes, and arguments that it refuses.
    direction = Direction()
    refused: tuple[str, ...] = ()
    # By name of an argument the classes that have it.
    _takers: dict[str, list[str]] = {}

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        own: dict[str, Any],
        /,
        *,
        policy: Policy | None = None,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        flatten: bool = False,
        perturb: Predicate | None = None,
        m_sharpness: Any = "global",
        master_weights: bool = False,
        **base_kwargs: Any,
    ) -> None:
        refuse_within_zero(type(self).__name__)
        if isinstance(params, nn.Module):
            raise TypeError(f"params should be those of the model, model.parameters(), but got a {type_name(params)}")
        check_number(perturb_eps, "perturb_eps", positive=True)  # 0 would make a zero gradient NaN
        if max_grad_norm is not None:
            check_number(max_grad_norm, "max_grad_norm", positive=True)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, but got {type_name(model)}")
        if self.direction.partial:
            own = {**own, "perturb": True}
        if perturb is not None:
            self.direction = self.direction.part(perturb, type(self).__name__)
        if not isinstance(master_weights, bool):
            raise TypeError(f"master_weights should be a bool, but got {master_weights!r}")
        self._refuse_arguments_of_others(base_optimizer, base_kwargs)
        self.policy = choose(policy, Always)
        if m_sharpness != "global":
            self._check_m_sharpness()
        rule = make_rule(base_optimizer, base_kwargs, tuple(own), type(self).__name__)
        if master_weights and not isinstance(rule, FusedRule):
            raise ValueError(
                f"{base_optimizer.__name__} cannot be the base optimizer with master_weights=True: it steps on the "
                "parameters themselves; torch.optim.SGD, Adam and AdamW step on the masters"
            )
        self.direction.check(own)
        max_norm = math.inf if max_grad_norm is None else float(max_grad_norm)
        self._knobs = (*vars(self), "_knobs")  # what a copy takes along; the rest is torch's, or made anew
        settings = Settings(float(perturb_eps), model, max_norm, bool(skip_nonfinite), m_sharpness, master_weights)
        self._step = Step(self, rule, settings, bool(flatten))
        super().__init__(params, {**rule.defaults, **own, NUMBERS: None})
        members = list(entries(self.param_groups))
        params = [p for p, *_ in members]
        if not master_weights:
            warn_half(params)
        self._bound()
        if any(p.is_meta for p in params):
            return  # they get memory before the first step, which does the rest
        if self.direction.partial and params:
            scales = {self.direction.scale(self.param_groups[g], name, p) for p, g, name, _ in members}
            if scales == {schema.LEFT_OUT}:
                warn(f"perturb= is false for every parameter: {type(self).__name__} takes its passes for nothing")
        self._step.share()
        if flatten:
            self._step.layouts.lay_out()

    def __init_subclass__(cls) -> None:
        """Show the shared keyword arguments in the signature of every class; they are spelled once, above."""
        super().__init_subclass__()
        signature = inspect.signature(cls.__init__)
        own = [p for p in signature.parameters.values() if p.name != "self"]
        if cls.__init__.__module__.startswith("sharpkern.") and "kwargs" in signature.parameters:
            shared = inspect.signature(SharpnessAwareOptimizer.__init__).parameters
            one = cls.closure_only or cls.one_gradient or cls.one_pass  # gradient that processes need alike
            left_out = {*signature.parameters, *cls.refused, *(() if cls.direction.partial else ("perturb",))}
            left_out |= {"m_sharpness"} if one else set()
            rest = [p for p in shared.values() if p.kind == p.KEYWORD_ONLY and p.name not in left_out]
            of_base = inspect.signature(torch.optim.SGD).parameters  # NudgedSGD has these of its own
            for p in [p for p in own if p.name not in of_base] if "__init__" in vars(cls) else []:
                cls._takers.setdefault(p.name, []).append(cls.__name__)
            own = [*own[:-1], *rest, shared["base_kwargs"]]
        cls.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]

    def _refuse_arguments_of_others(self, base_optimizer: Any, given: Mapping[str, Any]) -> None:
        """Raise TypeError for what neither this class nor the base optimizer takes, but another class does."""
        for name in self._takers.keys() & given.keys() if inspect.isclass(base_optimizer) else ():
            known = inspect.signature(base_optimizer).parameters
            if name not in known and all(p.kind != p.VAR_KEYWORD for p in known.values()):
                takers = ", ".join(self._takers[name])
                raise TypeError(f"{type(self).__name__} takes no {name}=, which is of {takers}")

    def wants_second_pass(self, step: Step) -> bool:
        """What the policy decides."""
        answer = self.policy.decide(step)
        if answer is None:
            raise TypeError(f"{type_name(self.policy)}.decide should return a bool, but returned None")
        if not isinstance(self.policy, (Scheduled, Adaptive)):
            step.collect()  # a user's may have put other gradients in place of those that were collected
        return bool(answer)

    def __repr__(self) -> str:
        """torch's, with the arguments that are of no group."""
        given = {name: value for name, value in vars(self).items() if name in self._knobs and not name.startswith("_")}
        own = {name: x for name, x in given.items() if isinstance(x, (int, float, Policy)) and x != Always()}
        head, *lines = [line for line in super().__repr__().split("\n") if line.strip() != f"{NUMBERS}: None"]
        return "\n".join([head, *(f"{name}: {value}" for name, value in sorted(own.items())), *lines])

    def _check_m_sharpness(self) -> None:
        """Raise TypeError where a first gradient of each process's own has no meaning."""
        name = type(self).__name__
        if self.closure_only:
            raise TypeError(
                f"{name} takes no m_sharpness=: its learning rate is one number, and S of each process's own gradient "
                "would be another one in each"
            )
        if self.one_gradient or self.one_pass:
            raise TypeError(f"{name} takes no m_sharpness=: a step has one gradient, which all processes need")
        if not isinstance(self.policy, (Scheduled, Adaptive)):
            raise TypeError(
                "m_sharpness= goes with a policy that decides the same in every process, a Scheduled or Adaptive one, "
                f"but got {type_name(self.policy)}"
            )

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that the gradient of the last pass is clipped to; None where it is not."""
        return None if math.isinf(self._step.settings.max_norm) else self._step.settings.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float | None) -> None:
        if norm is not None:
            check_number(norm, "max_grad_norm", positive=True)
        max_norm = math.inf if norm is None else float(norm)
        self._step.settings = dataclasses.replace(self._step.settings, max_norm=max_norm)

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Raise for a group whose options are out of range."""
        self.direction.check(group)
        self._step.rule.check(dict(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.

        Raises:
            ValueError, TypeError: for options out of range and parameters that cannot be optimized, before
                anything changed.
            RuntimeError: while a step is pending.
        """
        self._refuse_open("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if "params" not in param_group:
            raise ValueError("param_group has no 'params'")
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
        self.check_options({**self.defaults, **group})
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        self.direction.check_part(params)
        known = {p for other in self.param_groups for p in other["params"]}
        trained = [(p, name) for p, _, _, name in entries(self.param_groups) if p.requires_grad and not p.is_meta]
        fresh = check_params(params, len(self.param_groups), known)
        if self._step.apart:
            self._step.apart.check(fresh)
        check_aliases(trained + fresh)
        super().add_param_group(group)
        self._step.layouts.valid = False
