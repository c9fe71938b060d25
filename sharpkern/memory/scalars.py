"""The numbers of a step, by name: squared norms and products of every layout, statistics, counters, histories.

An optimizer declares them; saving, loading, copying and the checks of what is loaded go over the declarations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import schema


@dataclass(frozen=True)
class Sum:
    """A number that every layout has a part of: on each device a row of the parts, in the order of the layouts.

    Args:
        kept: the name under which the sum outlives its step; None: it means something within a step only.
    """

    kept: str | None = None


# What a declaration may be: a Sum; a tensor, the value at the start, on the first layout's device; a number or a list
# of numbers, which is the host's.
Declarations = Mapping[str, Any]

# What every optimizer has. `first` and `last`: squared norms of a step's first and last gradient, `dot`: their product.
# `counters`: first passes followed by a second one, second passes, skipped steps; a captured step counts on the device
# as it is replayed.
# `t`: first passes so far, the number of the next step. `plain_steps`: those without a second one. `base_steps`: steps
# of the base rule without a first pass.
BASE: Declarations = {
    "first": Sum("squared_norm"),
    "last": Sum(),
    "dot": Sum(),
    "counters": torch.zeros(3, dtype=torch.int64, device="cpu"),
    "t": 0,
    "plain_steps": 0,
    "base_steps": 0,
}


def of_state(name: str) -> Declarations:
    """What goes with per-parameter state: the squared norm of all of it, and how many parameters have it."""
    return {name: Sum(f"{name}_squared_norm"), f"{name}_count": 0}


def merged(*declarations: Declarations) -> dict[str, Any]:
    """All of them.

    Raises:
        ValueError: for a name that is declared twice.
    """
    names = [name for each in declarations for name in each]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the number {name!r} is declared twice: by the algorithm, its policy, or every optimizer")
    return {name: value for each in declarations for name, value in each.items()}


def saved_names(declarations: Declarations) -> set[str]:
    """The names under which what is declared is saved."""
    return {kept for name, d in declarations.items() if (kept := d.kept if isinstance(d, Sum) else name)}


class Scalars:
    """The numbers that an optimizer declared.

    Args:
        declarations: by name. Sums that follow each other can be read as one matrix.
    """

    def __init__(self, declarations: Declarations) -> None:
        sums = [(name, d) for name, d in declarations.items() if isinstance(d, Sum)]
        self._rows = {name: i for i, (name, _) in enumerate(sums)}
        self._kept = {d.kept: i for i, (_, d) in enumerate(sums) if d.kept}  # rows of the sums that outlive a step
        self._matrices: dict[torch.device, Tensor] = {}  # [sums, layouts]
        self._devices: list[torch.device] = []  # of each layout
        self.coefficients: dict[torch.device, Tensor] = {}  # a and b of a mixed gradient a g + b v
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        self._values: dict[str, Any] = dict.fromkeys(self._kept, zero)
        self._values |= copy.deepcopy({name: d for name, d in declarations.items() if not isinstance(d, Sum)})

    def __getitem__(self, name: str) -> Any:
        """A value by its name; a kept sum by the name under which it is kept."""
        if name in self._kept:
            for matrix in self._matrices.values():
                return matrix[self._kept[name]].sum()
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if self._devices and isinstance(value, Tensor) and value.dim():
            home = self._devices[0]
            value = value.to(home, schema.scalar_dtype(home) if value.is_floating_point() else value.dtype)
        self._values[name] = value
        if name in self._kept:
            for matrix in self._matrices.values():
                row = matrix[self._kept[name]].zero_()
                row[0] = value  # in the first layout's place: only sums are looked at

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def host(self) -> dict[str, Any]:
        """The values that are the host's."""
        return {name: value for name, value in self._values.items() if not isinstance(value, Tensor)}

    # With the layouts.

    def lie_with(self, devices: Sequence[torch.device]) -> None:
        """There are new layouts, on these devices; what is known goes with the first one. A step may be under way."""
        kept = {name: self[name] for name in self._kept}
        sums = [(i, matrix[i].sum()) for matrix in list(self._matrices.values())[:1] for i in self._rows.values()]
        self._devices = list(devices)
        self._matrices = {
            device: torch.zeros(len(self._rows), len(devices), dtype=schema.scalar_dtype(device), device=device)
            for device in devices
        }
        self.coefficients = {device: matrix.new_zeros(2) for device, matrix in self._matrices.items()}
        for name, value in {**self._values, **kept}.items():
            self[name] = value
        for matrix in self._matrices.values():
            for i, total in sums:
                matrix[i, 0] = total

    def row(self, name: str, device: torch.device) -> Tensor:
        """[layouts]: the parts of a sum, as a device has them."""
        return self._matrices[device][self._rows[name]]

    def rows(self, first: str, last: str, device: torch.device) -> Tensor:
        """[sums, layouts]: the sums from ``first`` to ``last``, in the order of their declaration."""
        return self._matrices[device][self._rows[first] : self._rows[last] + 1]

    def share(self, name: str) -> None:
        """Every device gets the parts of a sum that were computed on the others."""
        if len(self._matrices) > 1:
            for device in self._matrices:
                for i, home in enumerate(self._devices):
                    if home != device:
                        self.row(name, device)[i].copy_(self.row(name, home)[i], non_blocking=True)

    # Saved and loaded.

    def save(self) -> dict[str, Any]:
        """Every value that outlives a step: fractions and lists as float64 tensors, counts as they are."""
        return {name: _saved(self[name]) for name in self._values}

    def plain(self) -> dict[str, Any]:
        """The same, exactly, as numbers and lists of a fixed length; a list of the host's as a string of its numbers,
        for some tools take lists apart and put them together in another process, by its length there. Waits for a
        device."""
        return {name: _plain(self[name]) for name in self._values}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError for values that do not fit the declarations. Other names are not looked at."""
        for name, mine in self._values.items():
            if name not in saved:
                continue
            like = _saved(mine)
            value = _as_saved(saved[name], like)
            if isinstance(like, int):
                fits = isinstance(value, int)
            else:
                fits = isinstance(value, Tensor) and value.dim() == like.dim()
                fits = fits and (isinstance(mine, list) or value.size() == like.size())
                fits = fits and (value.dtype == like.dtype or (value.is_floating_point() and like.is_floating_point()))
            if not fits:
                raise ValueError(f"loaded state dict has {name} {saved[name]!r}, expected one like {like!r}")

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take the values that are there; the others stay."""
        for name, mine in self._values.items():
            if name in saved:
                value = _as_saved(saved[name], _saved(mine))
                if isinstance(mine, list):
                    self._values[name] = value.tolist()
                elif isinstance(mine, float):
                    self._values[name] = float(value)
                else:
                    self[name] = value.clone() if isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(repr, value))
    return value.tolist() if isinstance(value, Tensor) else value


def _as_saved(value: Any, like: Any) -> Any:
    """What ``save`` makes, from that or from what ``plain`` makes; whatever is neither stays as it is."""
    if not isinstance(like, Tensor) or not isinstance(value, (int, float, list, str)):
        return value
    try:
        numbers = [float(x) for x in value.split()] if isinstance(value, str) else value
        return torch.tensor(numbers, dtype=torch.float64 if like.is_floating_point() else None, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return value


def _saved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return value if isinstance(value, int) else torch.tensor(value, dtype=torch.float64, device="cpu")
