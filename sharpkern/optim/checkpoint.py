"""Saving, loading and copying: generic over what an algorithm, its policy and its rule declare."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import warn
from ..direction import Direction
from ..distributed import is_zero
from ..memory.layout import MASTER
from ..memory.layouts import check_memory, entries
from ..memory.scalars import merged, of_state, saved_names
from ..memory.state import of_parameters
from ..policy import Always, Policy
from ..rules import FusedRule
from .step import Step

# A key of state dicts: the numbers of the algorithm. And of each of their groups: the same, for tools that keep
# ``state`` and ``param_groups`` only; some of those take the keys from the live groups, where its value is None.
NUMBERS = "sharpkern"


class Checkpoints(Optimizer):
    """An optimizer whose state lies in flat buffers, and whose numbers go with its state dict."""

    _step: Step
    _knobs: tuple[str, ...]
    policy: Policy
    direction: Direction
    # What an algorithm declares: numbers that it keeps (``memory/scalars.py``), set before ``__init__`` is called.
    scalars: Mapping[str, Any] = {}
    # Names in ``opt.state[p]`` that are the algorithm's, not the rule's; of every class: one that does not know
    # another's leaves it out when it loads.
    state_names: tuple[str, ...] = ()
    _family: set[str] = set()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.startswith("sharpkern."):
            Checkpoints._family.update(cls.state_names)

    def _bound(self) -> Step:
        """The step, with the groups and the state that are the optimizer's now: users may put others in their place."""
        self._step.layouts.param_groups, self._step.layouts.state = self.param_groups, self.state
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with one more key ``sharpkern``: the numbers of the algorithm.

        It stands at the top, and again in every group, so that a tool that keeps ``state`` and ``param_groups`` only,
        as torch.distributed.checkpoint does, keeps them: there as numbers and lists of a fixed length, and SALR's
        history as a string of numbers.

        Raises:
            RuntimeError: while the weights are perturbed or a step is pending; over ZeroRedundancyOptimizer.
        """
        self._refuse_amid_step("state_dict()")
        self._refuse_zero("state_dict()")
        self._warn_of_more()
        # The first of the post-hooks: the user's see the whole dict, and may return another one.
        handle = self.register_state_dict_post_hook(lambda _, state: self._complete_saved(state), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _complete_saved(self, state: dict[str, Any]) -> None:
        if self._step.owns_state:
            # Views of flat buffers: whoever pickles them one by one would pickle the whole buffer each time.
            state["state"] = {i: _cloned(entry) for i, entry in state["state"].items()}
        head: dict[str, Any] = {"version": 1}
        if self._step.layouts.mastered:
            head["masters"] = 1
        if self.direction.by_name:
            head["scaled"] = self._scaled([group.get("param_names") for group in self.param_groups])
        state[NUMBERS] = {**head, **self._step.scalars.save()}
        plain = {**head, **self._step.scalars.plain()}
        for group in state["param_groups"]:
            group[NUMBERS] = dict(plain)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the base optimizer; or of another class of this package, of which state
        and numbers that this one does not know are left out.

        Options and numbers that it lacks keep their values; state is copied and never cast down. A warning tells of
        state without the numbers that the training depends on. What ``accumulate`` took is dropped.

        Raises:
            ValueError, TypeError: when it does not fit the parameters, or an option of a group is out of range, before
                anything changed.
            RuntimeError: while a step is pending, or a parameter is on the meta device; over ZeroRedundancyOptimizer.
        """
        self._refuse_open("load_state_dict()")
        self._refuse_zero("load_state_dict()")
        self._warn_of_more()
        # The last of the pre-hooks: it sees the dict as the user's hooks left it.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: self._check_loaded(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._step.loading = None
        if self._step.micro_batches:  # of the training before
            self._step.finish()

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        step = self._step
        for group in loaded["param_groups"]:
            # Not the base rule's options, nor does torch. Not a tensor: reading one may wait for its device.
            numbers = {key: value for key, value in group.items() if not isinstance(value, Tensor)}
            self.direction.check({**self.defaults, **numbers})
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        for i, (p, _, _, label) in zip(ids, entries(self.param_groups), strict=False):
            entry = loaded["state"].get(i, {})
            if p.requires_grad or entry:
                check_memory(p, label)
            self._check_entry(entry, p, label)
        if self._step.layouts.mastered:
            self._warn_without_masters(loaded["state"], ids)
        own = _numbers(loaded)
        if own is not None:
            if not isinstance(own, dict):
                raise ValueError(f"loaded state dict has sharpkern {own!r}, expected a dict")
            if own.get("version") != 1:
                raise ValueError(f"loaded state dict has sharpkern version {own.get('version')}, this one reads 1")
            if not {"counters", "squared_norm"} <= own.keys():
                raise ValueError(
                    f"loaded state dict has sharpkern statistics {sorted(own)}, expected counters, squared_norm"
                )
            # State that the dict knows nothing of was not there: fewer directions, say.
            absent = [name for name in self.state_names if not own.keys() & saved_names(of_state(name))]
            declared = saved_names(step.declared) - saved_names(merged(*map(of_state, absent)))
            found = declared & own.keys()
            if found and found != declared:
                raise ValueError(f"loaded state dict has {sorted(found)} of {sorted(declared)} only")
            step.scalars.check(own)
            self._compare_scaled(own, loaded["param_groups"])
        elif self._course and any(map(loaded["state"].get, ids)):
            warn(
                f"the loaded state dict has state, but not the numbers that {type(self).__name__} keeps beside it (key "
                f"{NUMBERS!r}): {', '.join(self._course)} stay what they are here"
            )
        step.loading = loaded

    def _check_entry(self, entry: Any, p: Tensor, label: str) -> None:
        """Raise ValueError for loaded state of a parameter that does not fit it."""
        if not isinstance(entry, dict):
            raise ValueError(f"loaded state dict has state {entry!r} for {label}, expected a dict")
        rule = self._step.rule
        ours = (*self.state_names, *rule.buffers, *(MASTER,) * isinstance(rule, FusedRule))
        for key, value in entry.items():
            if key in ours and value is not None:
                if not isinstance(value, Tensor):
                    raise ValueError(f"loaded state dict has {key} {value!r} for {label}, expected a tensor")
                if value.size() != p.size():
                    raise ValueError(
                        f"loaded state dict has {key} of shape {tuple(value.size())} for {label} "
                        f"of shape {tuple(p.size())}"
                    )
            if key == "step" and isinstance(rule, FusedRule):
                one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
                if not one:
                    raise ValueError(f"loaded state dict has step {value!r} for {label}, expected a number")
                missing = [name for name in rule.required if entry.get(name) is None]
                if missing and value > 0:
                    raise ValueError(
                        f"loaded state dict has a step, but no {' and no '.join(missing)} for {label}: it is not of "
                        f"{rule.base.__name__}"
                    )

    def _warn_without_masters(self, state: Mapping[Any, Any], ids: list[Any]) -> None:
        """Warn of a state dict that was trained without them."""
        half = [i for i, (p, *_) in zip(ids, entries(self.param_groups), strict=False) if p.dtype.itemsize == 2]
        if any(state.get(i) and state[i].get(MASTER) is None for i in half):
            warn(
                "the loaded state dict has no master weights for some parameters: they are taken from the parameters, "
                "rounded as those are"
            )

    def _names(self, loaded: list[dict[str, Any]]) -> list[list[str] | None]:
        """The names that each group's parameters have after loading: the loaded ones, as in torch; but those here where
        a tool cut the parameters into groups otherwise, so that the loaded ones are other parameters'."""
        here = {name: p for p, _, name, _ in entries(self.param_groups) if name}
        found = []
        for old, new in zip(self.param_groups, loaded, strict=False):
            names, params = new.get("param_names"), old["params"]
            fit = names and len(names) == len(params) and all(map(operator.is_, map(here.get, names, params), params))
            found.append(names if fit else old.get("param_names"))
        return found

    def _scaled(self, names: list[list[str] | None]) -> list[int]:
        """How many tensors the direction scales, of how many elements, if the groups' parameters have these names."""
        sizes = [
            p.numel()
            for group, found in zip(self.param_groups, names, strict=False)
            for i, p in enumerate(group["params"])
            if self.direction.scaled(group, found[i] if found else None, p)
        ]
        return [len(sizes), sum(sizes)]

    def _compare_scaled(self, own: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        """Warn where loading changes what the direction scales.

        Raises:
            ValueError: for what is no such count.
        """
        if self.direction.by_name and "scaled" in own:
            before, after = own["scaled"], self._scaled(self._names(groups))
            if not (isinstance(before, list) and [type(x) for x in before] == [int, int]):
                raise ValueError(f"loaded state dict has scaled {before!r}, expected one like {after!r}")
            if before != after:
                warn(
                    f"{type(self).__name__} scaled {before[0]} tensors of {before[1]} elements when the state dict was "
                    f"saved, and scales {after[0]} of {after[1]}: it goes by their names where it has any. Make it of "
                    "named_parameters() both times, or of parameters() both times"
                )

    @property
    def _course(self) -> list[str]:
        """The numbers that decide what the next steps do."""
        names = saved_names({**self.scalars, **self.policy.scalars})
        return ["the number of steps", *sorted(names)] if names or not isinstance(self.policy, Always) else []

    def _take_loaded(self, loaded: dict[str, Any], state: dict[str, Any]) -> None:
        """Complete what torch made of a state dict: missing options, state that torch cast."""
        names, rule = self._names(state["param_groups"]), self._step.rule
        for old, new, found in zip(self.param_groups, state["param_groups"], names, strict=True):
            for key, value in old.items():
                new.setdefault(key, value)
            if isinstance(rule, FusedRule):
                rule.amend(new)
            new[NUMBERS] = None
            new["param_names"] = found
            if found is None:
                del new["param_names"]
        # torch casts floating-point state to the parameter's dtype; ours keeps the loaded one's, and so does a wrapped
        # optimizer's number (NAdam's mu_product), which is of no parameter's dtype.
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [p for group in state["param_groups"] for p in group["params"]]
        fused = isinstance(rule, FusedRule)
        for i, p in zip(ids, params, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    kept = fused or key in ("step", *self.state_names) or value.dim() == 0 < p.dim()
                    state["state"][p][key] = (value if kept else state["state"][p][key]).clone()
        foreign = self._family - set(self.state_names)
        # A wrapped optimizer may call state of its own so.
        ours = fused or (_numbers(loaded) or {}).get("masters")
        if ours and not self._step.layouts.mastered:
            foreign = {*foreign, MASTER}
        for p in [p for p, entry in of_parameters(state["state"]) if foreign & entry.keys()]:
            state["state"][p] = {key: value for key, value in state["state"][p].items() if key not in foreign}
            if not state["state"][p]:
                del state["state"][p]

    def _take_numbers(self, loaded: dict[str, Any]) -> None:
        own = _numbers(loaded) or {}
        if own and "t" not in own:
            own = {**own, "t": int(own["counters"][0]), "plain_steps": 0}
        self._step.scalars.load(own)
        for name in self.state_names:
            if f"{name}_count" not in own:
                self._step.scalars[f"{name}_count"] = -1  # of nothing: the norm is taken anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_knobs" in state:  # a copy
            numbers, settings = state.pop("numbers"), state.pop("settings")
            super().__setstate__(state)
            self._step = Step(self, *settings)
            self._step.scalars.load(numbers)
            return
        loading = self._step.loading
        if loading is not None:
            self._take_loaded(loading, state)
        # In place: proxies, schedulers and a wrapped optimizer may hold these very objects. Nothing else of torch's is
        # set: a proxy would keep it, and with it hooks of its own.
        before = list(self.param_groups), dict(self.state)
        try:
            self._put(state["param_groups"], state["state"])
            self._bound().share(loaded=True)
        except BaseException:  # a wrapped optimizer did not take it
            self._put(*before)
            raise
        if loading is not None:
            self._take_numbers(loading)
        layouts = self._step.layouts
        if layouts.valid and all(layout.attached() for layout in layouts):
            layouts.take_state()
        else:
            layouts.lay_out()

    def _put(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        self.param_groups[:] = groups
        if state is not self.state:
            self.state.clear()
            self.state.update(state)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_amid_step("copying or pickling an optimizer")
        step, state = self._step, super().__getstate__()
        if not isinstance(step.settings.m_sharpness, str):
            raise RuntimeError(
                "an optimizer with m_sharpness= of a process group cannot be copied or pickled, for the group cannot: "
                "save its state_dict()"
            )
        if step.owns_state:
            # Views of one flat buffer: pickled as they are, each would carry the whole buffer along.
            clones: defaultdict[Any, Any] = defaultdict(dict)
            clones.update({p: _cloned(entry) for p, entry in self.state.items()})
            state["state"] = clones
        knobs = {name: getattr(self, name) for name in self._knobs}
        settings = (step.rule, step.settings, step.layouts.flatten)
        return {**state, **knobs, "numbers": step.scalars.save(), "settings": settings}

    def _refuse_open(self, what: str) -> None:
        if self._step.is_open:
            raise RuntimeError(f"{what} between two passes of a step: call second_step() or restore() first")

    def _warn_of_more(self) -> None:
        """Once: a wrapped base optimizer may save more than state and groups."""
        base = self._step.rule.base
        if any(getattr(base, name) is not getattr(Optimizer, name) for name in ("state_dict", "load_state_dict")):
            self._step.warn_once(
                f"{base.__name__} has a state_dict() or load_state_dict() of its own, which is not called: what it "
                "saves beside state and param_groups is not in this state dict"
            )

    def _refuse_zero(self, what: str) -> None:
        if is_zero(self._step.rule.base):
            raise RuntimeError(
                f"{what} of {type(self).__name__} over ZeroRedundancyOptimizer: the state lies in pieces with its own "
                "optimizers. For checkpoints shard the model with torch.distributed.fsdp.fully_shard, or take the "
                "optimizer under DistributedDataParallel without it"
            )

    def _refuse_perturbed(self, what: str) -> None:
        if self._step.layouts.away:
            raise RuntimeError(f"{what} while the weights are perturbed: call second_step() or restore() first")

    def _refuse_amid_step(self, what: str) -> None:
        self._refuse_perturbed(what)
        self._refuse_open(what)  # a pending step is counted already


def _numbers(loaded: dict[str, Any]) -> Any:
    """The numbers in a state dict: at its top, else in the first group that has them."""
    everywhere = [loaded.get(NUMBERS), *(group.get(NUMBERS) for group in loaded["param_groups"])]
    return next((own for own in everywhere if own is not None), None)


def _cloned(entry: Any) -> Any:
    """A copy of a parameter's state; whatever else stands among it, as it is."""
    if not isinstance(entry, dict):
        return entry
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
