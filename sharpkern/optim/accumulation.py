"""Micro-batches whose gradients add up to that of a step: their closures, called once more in every further pass."""

from __future__ import annotations

import dis
import functools
import itertools
import numbers
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MicroBatches:
    """Of the step that is being accumulated; false where none was begun."""

    def __init__(self) -> None:
        self._closures: list[Callable[[], Any]] = []
        self._variables: list[dict[Any, Any]] = []  # what each closure read
        self._losses: list[Any] = []  # of the first pass: one a micro-batch, whether its closure is kept or not
        self._running: int | None = None  # the number of the closure that is being called

    def __bool__(self) -> bool:
        return self._running is not None or bool(self._losses)

    @property
    def kept(self) -> bool:
        """Whether closures may be called in further passes."""
        return bool(self._closures)

    def drop(self) -> None:
        """There are none any more."""
        self._closures, self._variables, self._losses = [], [], []

    def take(self, closure: Callable[[], Any], keep: bool) -> Any:
        """Call the closure of one more micro-batch in the first pass; keep it where there may be others."""
        closures, variables, losses = self._closures, self._variables, self._losses
        loss = self._call(len(losses), closure)  # which may drop them: others are in their place then
        losses.append(kept(loss))
        if keep:
            closures.append(closure)
            variables.append(_variables(closure))
        return loss

    def closure(self) -> Callable[[], Any]:
        """A closure of all of them, whose first call is done.

        Raises:
            RuntimeError: within one of theirs, and where one reads a variable that has another value now.
        """
        self.check_between()
        for closure, before in zip(self._closures, self._variables, strict=True):
            for place, (name, value) in _variables(closure).items():
                _, known = before.get(place, (name, value))  # of another function now: that is told of by its name
                if not (value is known or (_is_immutable(value) and type(value) is type(known) and value == known)):
                    raise RuntimeError(
                        f"a closure that accumulate() took reads {name!r}, which has another value now that it is to "
                        "be called for the next pass: give it its own, with functools.partial or as a default argument"
                    )
        closures, losses, calls = self._closures, self._losses, itertools.count()
        return lambda: total(losses if next(calls) == 0 else [kept(self._call(i, c)) for i, c in enumerate(closures)])

    def resetting(self) -> bool:
        """Gradients are about to be reset: whether those of earlier micro-batches are dropped with it.

        Raises:
            RuntimeError: within a closure, where the others of its pass would be lost.
        """
        if self._running:
            raise RuntimeError(
                "the closure of a micro-batch resets the gradients, also those of the ones before it: leave "
                "zero_grad() out of what accumulate() calls"
            )
        return self._running is None and bool(self._losses)

    def check_between(self) -> None:
        """Raise within a closure."""
        if self._running is not None:
            raise RuntimeError("step() or accumulate() was called within a closure that accumulate() took")

    def _call(self, number: int, closure: Callable[[], Any]) -> Any:
        self.check_between()
        self._running = number
        try:
            return closure()
        finally:
            self._running = None


def _is_immutable(value: Any) -> bool:
    """Whether an equal one is as good."""
    if isinstance(value, tuple):
        return all(map(_is_immutable, value))
    return isinstance(value, (int, float, complex, str, bytes, torch.device, torch.dtype, type(None)))


def kept(loss: Any) -> Any:
    """What a closure returned, without its graph, and in memory of its own: that of a captured graph's output, say, is
    written again by the next call."""
    return loss.detach().clone() if isinstance(loss, Tensor) else loss


def total(losses: list[Any]) -> Any:
    """The sum of losses that are kept; None where any of them is no number. The last one may be None: of a closure that
    did nothing, which trainers hand to ``step``."""
    losses = losses[:-1] if losses and losses[-1] is None else losses
    if not losses or not all(map(_is_number, losses)):
        return None
    return functools.reduce(operator.add, losses)


def _is_number(loss: Any) -> bool:
    return loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, numbers.Number)


def _variables(closure: Any) -> dict[int | str, tuple[str, Any]]:
    """What a function, and those of its module that it calls by name, read around them, as a loop's variables, and none
    of them writes: name and value of each, by its cell or, of a global one, its name."""
    function = closure
    while not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif callable(getattr(function, "__wrapped__", None)):
            function = function.__wrapped__
        else:
            return {}
    functions, written = [function], set[int | str]()
    values: dict[int | str, tuple[str, Any]] = {}
    for f in functions:
        cells = dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=True))
        places: dict[str, int | str] = {name: id(cell) for name, cell in cells.items()}
        read, stored = _names(f.__code__)
        written |= {places.get(name, name) for name in stored}
        for name in read:
            value = f.__globals__.get(name)
            if name in cells:
                try:
                    value = cells[name].cell_contents
                except ValueError:  # it has none
                    value = None
            values[places.get(name, name)] = name, value
            if isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
                functions += [value] * (value not in functions)
    return {place: found for place, found in values.items() if place not in written}


@functools.lru_cache(256)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """Variables around a function: those that it reads, and those that it writes."""
    read, codes = set(code.co_freevars), [code]
    written: set[str] = set()
    for part in codes:  # of functions and comprehensions within it, too
        codes += [constant for constant in part.co_consts if isinstance(constant, types.CodeType)]
        for instruction in dis.get_instructions(part):
            if instruction.opname.endswith(("_GLOBAL", "_DEREF")):
                stores = instruction.opname.startswith(("STORE", "DELETE"))
                (written if stores else read).add(str(instruction.argval))
    own = {name for part in codes for name in part.co_cellvars}
    return tuple(sorted(read - own)), frozenset(written - own)
