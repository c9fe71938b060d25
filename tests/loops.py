"""The plain loop that all others are held to: in test_loops.py stand-ins, in test_integrations.py the packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods import FIRST, METHODS, Method
from models import assert_same_bits, batches, make_net, state_of
from torch import Tensor, nn

STEPS = 12
MICRO = 3  # micro-batches a step, where gradients are accumulated
Batch = tuple[Tensor, Tensor]
Run = tuple[nn.Module, Any]  # a model and its optimizer


def make(method: Method, **more: Any) -> Run:
    """A model and its optimizer; a trigger that fires in some of the steps."""
    model = make_net()
    options = {**(dict(lambda_start=2.0, lambda_end=0.0) if method.triggered else {}), "model": model, **more}
    return model, method.make(model.named_parameters(), FIRST[method.name], STEPS, **options)


def data(micro: int = 1) -> list[Batch]:
    return batches(STEPS * micro, size=8)


def mean_loss(
    model: nn.Module, taken: list[Batch], backward: Callable[[Tensor], Any] = Tensor.backward, parts: int | None = None
) -> Tensor:
    """Of micro-batches, one backward each; each counts as one of so many parts, of all by default."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in taken:
        loss = nn.functional.cross_entropy(model(x), y) / (parts or len(taken))
        backward(loss)
        total += loss.detach()
    return total


def plain(method: Method, micro: int = 1, schedule: Any = None, **more: Any) -> Run:
    """The loop that every other one is held to."""
    model, opt = make(method, **more)
    scheduler = schedule(opt) if schedule else None
    for i in range(STEPS):
        taken = data(micro)[i * micro : (i + 1) * micro]
        opt.step(lambda taken=taken: mean_loss(model, taken))
        if scheduler:
            scheduler.step()
    if method.triggered:
        assert 0 < int(opt.stats["second_passes"]) < STEPS
    return model, opt


def assert_same(run: Run, other: Run) -> None:
    """Weights, buffers, state and numbers."""
    assert_same_bits(dict(run[0].state_dict()), dict(other[0].state_dict()))
    assert_same_bits(state_of(run[1]), state_of(other[1]))
    assert_same_bits(run[1].stats, other[1].stats)


BY_HAND = ("by hand", "step()", "step(closure)")


def every_way(*loops: str) -> Any:
    """Each class in each loop; SALR takes a closure."""
    cases = [(m, loop) for m in METHODS.values() for loop in loops if m.two_passes or loop not in BY_HAND]
    return pytest.mark.parametrize(("method", "loop"), cases, ids=map("-".join, ((str(m), loop) for m, loop in cases)))
