"""Per-parameter state: slots of flat buffers that stand in ``opt.state``, under the names that rule and algorithm
declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import schema
from .layout import MASTER, SCRATCH, Layout

State = Mapping[Tensor, dict[str, Any]]
Names = tuple[str, ...]


def of_parameters(state: Mapping[Any, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The entries of an optimizer's state that are parameters'. Others may stand there: users keep values of theirs."""
    return ((p, entry) for p, entry in state.items() if isinstance(p, Tensor) and isinstance(entry, dict))


class LayoutState:
    """The state of one layout's parameters, taken from the optimizer's ``state``.

    Args:
        rule: names of the buffers that are the rule's.
        own: of those that are the algorithm's.
        counted: whether each parameter counts its own steps, too.
    """

    def __init__(self, layout: Layout, state: State, rule: Names, own: Names, counted: bool) -> None:
        self.layout = layout
        # Steps applied to each parameter.
        self.step = torch.zeros(len(layout.params), dtype=torch.float32, device=layout.device)
        layout.buffers = {name: buffer for name, buffer in layout.buffers.items() if name in SCRATCH}
        self.forget()
        for i, p in enumerate(layout.params):
            entry = state.get(p) or {}
            if layout.masters:
                layout.take_master(i, entry.get(MASTER))
            elif counted and MASTER in entry:  # of a parameter that was of a half type
                layout.return_master(i, entry.pop(MASTER))
            stepped = "step" in entry or any(entry.get(name) is not None for name in rule)
            found = [name for name in (*rule, *own) if entry.get(name) is not None]
            for name in found:
                entry[name] = layout.take(name, i, entry[name])
            if layout.masters and MASTER in entry:
                entry[MASTER] = layout.shown(MASTER, i)
                found.append(MASTER)
            if counted and stepped:
                # A momentum buffer without a counter comes from torch.optim.SGD: it has been stepped.
                step = entry.get("step", 1.0)
                self.step[i].fill_(step.reshape(()) if isinstance(step, Tensor) else step)
                entry["step"] = self.step[i]
                found.append("step")
            self._exposed[i].update(found)

    def forget(self) -> None:
        """Nothing of it stands in the optimizer's state any more."""
        self._exposed: list[set[str]] = [set() for _ in self.layout.params]
        # The names of all groups for which every parameter has been through: a step need not look at them again.
        self._complete: set[tuple[Names, ...]] = set()

    def count_empty(self, applied: Tensor) -> None:
        """Empty shards that have a gradient in this pass count the step, which no kernel sees.

        Args:
            applied: whether it was not skipped, 0-d.
        """
        if self.layout.table.empty is not None:
            counted = [
                has and "step" in names
                for has, names in zip(self.layout.table.empty.tolist(), self._exposed, strict=True)
            ]
            self.step += torch.tensor(counted, device="cpu").to(self.step) * applied

    def count(self, name: str) -> int:
        """How many parameters' slots of a buffer stand in the optimizer's state."""
        return sum(name in names for names in self._exposed)

    def trained(self, name: str) -> list[bool]:
        """Whether each parameter is trained, and has this in the optimizer's state."""
        pairs = zip(self.layout.params, self._exposed, strict=True)
        return [p.requires_grad and name in names for p, names in pairs]

    def squared_norm(self, name: str) -> Tensor:
        """Of the slots of a buffer that stand in the optimizer's state, read on the host."""
        dtype = schema.scalar_dtype(self.layout.device)
        slots = [self.layout.view(name, i) for i, names in enumerate(self._exposed) if name in names]
        norms = [torch.linalg.vector_norm(slot, dtype=dtype) for slot in slots]
        return torch.stack(norms or [torch.zeros((), dtype=dtype, device="cpu")]).square().sum().cpu().double()

    def expose(self, state: State, names: tuple[Names, ...], touched: Callable[[], Sequence[bool]]) -> bool:
        """Put the state of parameters that have it for the first time into the optimizer's, as views.

        Args:
            names: what a parameter of each group has there.
            touched: whether each parameter has such state from this step on.

        Returns:
            Whether there was any.
        """
        if names in self._complete:
            return False
        for name in {name for group in names for name in group} - {"step"}:
            self.layout.buffer(name)
        complete, found = True, False
        for i, (p, now) in enumerate(zip(self.layout.params, touched(), strict=True)):
            wanted = names[self.layout.groups[i]]
            missing = not self._exposed[i].issuperset(wanted)
            if missing and now:
                for name in wanted:
                    state[p][name] = self.step[i] if name == "step" else self.layout.shown(name, i)
                self._exposed[i].update(wanted)
                found = True
            complete = complete and (now or not missing)
        if complete:
            self._complete.add(names)
        return found


def check_shapes(layout: Layout, state: State, names: Names) -> None:
    """Raise RuntimeError for state of another shape than its parameter."""
    for p, label in zip(layout.params, layout.names, strict=True):
        for name in names:
            value = state.get(p, {}).get(name)
            if value is not None and value.size() != p.size():
                raise RuntimeError(
                    f"{label} has shape {tuple(p.size())} now, its state {name} shape {tuple(value.size())}"
                )
