"""The layouts of one optimizer, a device and a dtype each, and of DTensors one way to lie on a mesh: whether they
still serve, whether weights are away."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from . import transfer
from .layout import SCRATCH, Layout
from .members import count_entries, identical
from .scalars import Scalars
from .shapes import SUPPORTED_DTYPES, is_dense, overlaps, share_memory, span_of
from .shards import Scope, check_supported, holders_of, is_sharded, local, placing, scope_of
from .state import LayoutState, Names, check_shapes

Group = dict[str, Any]
_ALIVE: weakref.WeakSet[Layouts] = weakref.WeakSet()
# Up to this relative difference a stored squared norm is that of the state that is there: rounding alone.
SAME_NORM = 1e-5


class Direction(Protocol):
    """What decides which T_w a parameter has."""

    def scale(self, group: Group, name: str | None, param: Tensor) -> int: ...
    def key(self, groups: list[Group]) -> Any: ...


class Layouts:
    """Layouts of an optimizer's parameters, with their state and numbers.

    Args:
        scalars: the numbers that lie with the layouts.
        direction: says which T_w a parameter has (``scale``), and when that may have changed (``key``).
        rule_state, own_state: flat buffers of the base rule and of the algorithm. A sum with its squared norm and a
            count of parameters go with each of the latter.
        counted: whether parameters count their steps.
        flatten: move weights and gradients into flat buffers too.
        mastered: whether parameters of half types have masters.
    """

    def __init__(
        self,
        scalars: Scalars,
        direction: Direction,
        rule_state: Names,
        own_state: Names,
        counted: bool,
        flatten: bool,
        mastered: bool = False,
    ) -> None:
        # The optimizer's, which keeps them up to date. It is not held itself: it holds this.
        self.param_groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._scalars, self._direction, self._counted = scalars, direction, counted
        self._rule_state, self._own_state = rule_state, own_state
        self.flatten, self.mastered = flatten, mastered
        # Whether backups hold the weights, and the parameters something else.
        self.away = False
        self.valid = False  # else they are laid out afresh before the next pass
        self._layouts: list[Layout] = []
        # The processes that have the parameters together, each a part; None where one has all of them.
        self.scope: Scope | None = None
        self._scoped: Any = None  # for what it was made
        self.states: list[LayoutState] = []
        self.places: list[Tensor] = []  # of every layout's parameters, in the order of the groups
        self.idle: list[Tensor] = []  # frozen, without a gradient or such state: in no layout
        self._members: list[list[Tensor]] = []
        self._scaled_for: Any = None
        self._seen_state: tuple[int, int, int] | None = None
        self._seen_own = 0
        _ALIVE.add(self)

    def __iter__(self) -> Iterator[Layout]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __getitem__(self, i: int) -> Layout:
        return self._layouts[i]

    @property
    def devices(self) -> set[torch.device]:
        """Where they lie."""
        return {layout.device for layout in self._layouts}

    @property
    def scaled(self) -> bool:
        """Whether any parameter has another T_w than 1."""
        return any(layout.any_scaled for layout in self._layouts)

    # Freshness.

    def refresh(self, open_step: bool, leaving: bool = False) -> None:
        """Notice whatever the user moved, froze, loaded or added since the last pass; follow what merely moved.

        Args:
            open_step: between two passes of a step members stay, for whatever was perturbed has to be found again; one
                that was frozen may join.
            leaving: the step is given up, and needs no numbers of the groups.

        Raises:
            RuntimeError: for groups that changed in an open step.
        """
        if open_step and not leaving and self._regrouped():
            raise RuntimeError(
                "param_groups changed between two passes of a step, and parameters are in other groups now: restore() "
                "gives the weights back"
            )
        stale = not self.valid or (any(map(_may_move, self.idle)) if open_step else self._changed())
        attached = [layout.attached() for layout in self._layouts]
        if stale or not all(attached):
            self.lay_out()
        elif not open_step and any(layout.moved for layout in self._layouts):
            pairs = [pair for layout in self._layouts for pair in zip(layout.params, layout.names, strict=True)]
            check_aliases([(p, name) for p, name in pairs if _may_move(p)])
            for layout in self._layouts:
                layout.moved = False
        if self._seen_state != self._state_key():
            if not open_step:
                self.take_state()
            else:  # cleared between two passes: the views come back with the step
                for state in self.states:
                    state.forget()
        elif self._seen_own != self._own_version():
            self._measure_own()
        for layout in self._layouts if self.mastered else ():
            if layout.masters:
                layout.heed_parameters()

    def _changed(self) -> bool:
        groups = self.param_groups
        return (
            len(groups) != len(self._members)
            or not all(identical(group["params"], known) for group, known in zip(groups, self._members, strict=True))
            or self._scaled_for != self._direction.key(groups)
            or any(map(self._takes_part, self.idle))
        )

    def _regrouped(self) -> bool:
        """Whether there is another number of groups, or a member moved to another one."""
        groups, members = self.param_groups, self._members
        if len(groups) != len(members):
            return True
        if all(identical(group["params"], known) for group, known in zip(groups, members, strict=True)):
            return False
        home = {p: g for g, known in enumerate(members) for p in known}
        return any(home.get(p, g) != g for g, group in enumerate(groups) for p in group["params"])

    def _takes_part(self, p: Tensor) -> bool:
        """Whether it may be moved, or is a part of the algorithm's direction."""
        if _may_move(p):
            return True
        state = self.state.get(p, {})
        return any(name in state for name in self._own_state)

    @torch.no_grad()
    def lay_out(self) -> None:
        """Lay out the parameters afresh and take the state over, from wherever it lies now.

        Raises:
            TypeError, ValueError: for parameters that cannot be optimized (any more).
            RuntimeError: for parameters on the meta device; while a CUDA graph is captured.
        """
        groups = self.param_groups
        members: dict[tuple[Any, ...], list[tuple[Tensor, int, str | None, str]]] = {}
        idle = []
        # Parameters whose weights are in a backup, and where; they have a slot whatever became of them.
        backups = {
            p: (layout, i)
            for layout in (self._layouts if self.away else [])
            for i, (p, marked) in enumerate(zip(layout.params, layout.table.marked(), strict=True))
            if marked
        }
        for entry in entries(groups):
            p = entry[0]
            if self._takes_part(p) or p in backups:
                check_memory(p, entry[3])
                check_supported(p, entry[3])
                if p.dtype not in SUPPORTED_DTYPES or p.layout != torch.strided:
                    raise TypeError(f"{entry[3]} is {p.dtype}, {p.layout}, on {p.device}: it cannot be optimized")
                if overlaps(local(p)):
                    raise ValueError(f"{entry[3]} has elements that share memory (an expanded tensor?)")
                members.setdefault((p.device, p.dtype, placing(p)), []).append(entry)
            else:
                idle.append(p)
        if any(transfer.is_capturing(device) for device, *_ in members):
            raise RuntimeError(
                "take one step before the capture of a CUDA graph: buffers cannot be laid out while it is captured"
            )
        laid = [(p, label) for alike in members.values() for p, _, _, label in alike]
        if not self.away:  # first the weights come back: the next step asks
            check_aliases(laid)
        for p, label in laid if self.flatten else []:
            if placing(p) is not None:
                raise ValueError(f"flatten=True takes no DTensor, but {label} is one: its memory is its module's")
            if not is_dense(p):
                raise ValueError(f"flatten=True needs parameters without gaps in memory, but {label} has some")
        present = {p for group in groups for p in group["params"]}
        for p, (layout, i) in backups.items():
            if p not in present:  # it left its group between two passes
                layout.give_back(i)
        layouts = []
        for alike in members.values():
            params, indices, names, labels = zip(*alike, strict=True)
            scale = [
                self._direction.scale(groups[g], name, p) for p, g, name in zip(params, indices, names, strict=True)
            ]
            layouts.append(Layout(params, labels, indices, scale, self.flatten, self._own_state, self.mastered))
        kept = {name for old in self._layouts if self.away for name in SCRATCH if name in old.buffers}
        for layout in layouts:
            layout.moved = self.away
            for name in kept:  # also where no parameter has anything there
                layout.buffer(name)
            for i, p in enumerate(layout.params):
                if p in backups:
                    layout.take_over(i, *backups[p])
        placings = [layout.placing for layout in layouts]
        everybody = next((found for p, _ in laid if is_sharded(p) and (found := holders_of(p))), None)
        if (placings, everybody) != self._scoped:
            self.scope, self._scoped = scope_of(placings, everybody), (placings, everybody)
        self._layouts, self.idle = layouts, idle
        place = {p: i for i, (p, *_) in enumerate(entries(groups))}
        self.places = [torch.tensor([place[p] for p in layout.params], device="cpu") for layout in layouts]
        self.valid = False  # until the state has been taken over
        self._members = [list(group["params"]) for group in groups]
        self._scaled_for = self._direction.key(groups)
        self._scalars.lie_with([layout.device for layout in layouts])
        self.take_state()
        self.valid = True

    # State.

    def _state_key(self) -> tuple[int, int, int]:
        """Changes when the user clears or replaces state, or a part of it."""
        return id(self.state), len(self.state), count_entries(self.state)

    def _own_version(self) -> int:
        """Changes when somebody writes the algorithm's state in place. A layout has it in one tensor; kernels write by
        address, which counts as nothing. A DTensor counts for itself what is written through it."""
        own = []
        for layout in self._layouts if self._own_state else ():
            own += [layout.buffers[name] for name in self._own_state[:1] if name in layout.buffers]
            for entry in (self.state.get(p, {}) for p in layout.params) if layout.shards is not None else ():
                own += [entry[name] for name in self._own_state if name in entry]
        return sum(x._version for x in own if not x.is_inference())

    def state_written(self) -> None:
        """A step put state where it belongs, or wrote it."""
        self._seen_state, self._seen_own = self._state_key(), self._own_version()

    @torch.no_grad()
    def take_state(self) -> None:
        """Take over whatever the optimizer's state holds now."""
        for layout in self._layouts:
            check_shapes(layout, self.state, (*self._rule_state, *self._own_state, *layout.masters))
        names = (self._rule_state, self._own_state)
        self.states = [LayoutState(layout, self.state, *names, self._counted) for layout in self._layouts]
        self._measure_own()

    def _measure_own(self) -> None:
        """Somebody else may have written the algorithm's state: its norms are of what is there now."""
        for name in self._own_state:
            count, known = sum(state.count(name) for state in self.states), self._scalars[f"{name}_count"]
            if count or known:
                parts = [state.squared_norm(name) for state in self.states]
                if self.scope is not None:
                    parts = list(self.scope.complete(torch.stack(parts)))
                found, stored = sum(parts), self._scalars[f"{name}_squared_norm"]
                # Of the same state the stored one has the bits of the run that it is of.
                if count != known or abs(found - stored) > SAME_NORM * stored:
                    self._scalars[f"{name}_squared_norm"] = found
            self._scalars[f"{name}_count"] = count
        self.state_written()

    def expose(self, names: tuple[Names, ...], trained: bool = False) -> None:
        """Every parameter with a gradient has state of these names, by its group, from this step on; of zeros at first.

        Tools that restore a checkpoint take what state there is from a step on zero gradients.

        Args:
            trained: every parameter that requires a gradient, outside of a step.
        """

        def touched(layout: Layout) -> list[bool]:
            return [p.requires_grad for p in layout.params] if trained else layout.table.has_gradient()

        found = []
        for state in self.states:
            masters = state.layout.masters
            wanted = tuple((*group, *masters) for group in names) if masters else names
            found.append(state.expose(self.state, wanted, partial(touched, state.layout)))
        if any(found):
            self.count_own()

    def count_own(self) -> None:
        """A step put state where it belongs, or wrote it: note that, and how many parameters have the algorithm's."""
        for name in self._own_state:
            self._scalars[f"{name}_count"] = sum(state.count(name) for state in self.states)
        self.state_written()

    # Weights.

    def restore(self) -> None:
        """Write the weights back that the backups hold. They hold them on."""
        for layout in self._layouts:
            params, _, table, blocks = layout.walk
            torch.ops.sharpkern.restore.default(params, layout.buffer("backup"), table, blocks, dtype=layout.dtype)
            layout.written()

    def finish(self) -> None:
        """No gradient is held, no backup is in use: the weights are at home."""
        for layout in self._layouts:
            layout.finish()
        self.away = False

    def zero_grads(self) -> None:
        """Zero the gradients, which are views of flat buffers."""
        for layout in self._layouts:
            if layout.flat is not None:
                layout.flat.zero_grads()

    def unflatten(self) -> None:
        """Give every parameter and gradient memory of its own again."""
        for layout in self._layouts:
            layout.unflatten()
        self.flatten = False


def is_away(params: Iterable[Tensor]) -> bool:
    """Whether any optimizer has moved the weights of any of these away."""
    asked = set(map(id, params))
    return any(id(p) in asked for layouts in list(_ALIVE) if layouts.away for layout in layouts for p in layout.params)


def entries(groups: list[Group]) -> Iterable[tuple[Tensor, int, str | None, str]]:
    """(parameter, group index, its name or None, what errors call it)."""
    for g, group in enumerate(groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = names[i] if names else None
            yield p, g, name, f"parameter {name!r}" if name else f"parameter {i} of group {g}"


def check_memory(p: Tensor, label: str) -> None:
    """Raise RuntimeError for a parameter on the meta device."""
    if p.is_meta:
        raise RuntimeError(
            f"{label} is on the meta device: it has no data to optimize. Give it some before the first step (to_empty "
            "puts new parameters in the place of a module's: make the optimizer afterwards, or call "
            "torch.__future__.set_swap_module_params_on_conversion(True) before)"
        )


def check_aliases(params: list[tuple[Tensor, str]]) -> None:
    """Raise ValueError for parameters that share memory: two threads would write it at once."""
    spans = sorted(((*span_of(local(p)), name, local(p)) for p, name in params), key=itemgetter(0, 1))
    for i, (_, end, name, p) in enumerate(spans):
        for begin, _, other, q in spans[i + 1 :]:
            if begin >= end:
                break
            if share_memory(p, q):
                raise ValueError(
                    f"{name} and {other} share memory: register one tensor in both places instead; where one has left "
                    "the model, take it out of its group"
                )


def _may_move(p: Tensor) -> bool:
    return p.requires_grad or p.grad is not None
